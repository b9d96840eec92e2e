"""``wsiflow forest``: train a random forest on features, or score the slides of a run with it."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from wsiflow.evaluation import slide_score
from wsiflow.evaluation.forest import Choices
from wsiflow.run.plan import latest_plan

from ..options import natural, positive
from ..terminal import say


def add_options(parser: ArgumentParser) -> None:
    """Add the actions ``train`` and ``score``, each with its options."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    _add_train(
        actions.add_parser("train", help="choose by cross-validation, grow, write; needs three patients of each class")
    )
    _add_score(actions.add_parser("score", help="write slide_id,score for every slide of a run"))


def main(arguments: Namespace) -> int:
    """Train a forest, or score slides with one."""
    arguments.action(arguments)
    return 0


def _add_train(parser: ArgumentParser) -> None:
    parser.set_defaults(action=_train)
    parser.add_argument("--features", type=Path, required=True, help="CSV of wsiflow features")
    parser.add_argument("--manifest", type=Path, required=True, help="CSV with slide_id, path, label, split")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--trees", type=positive, default=300, help="trees; choices are compared with a third (300)")
    parser.add_argument("--seed", type=natural, default=0)


def _add_score(parser: ArgumentParser) -> None:
    parser.set_defaults(action=_score)
    parser.add_argument("run", type=Path)
    parser.add_argument("--forest", type=Path, required=True, help="JSON of wsiflow forest train")
    parser.add_argument("--out", type=Path, required=True, help="CSV to write, for wsiflow evaluate --scores")
    parser.add_argument("--also-training", action="store_true", help="score slides too that the forest was trained on")


def _train(arguments: Namespace) -> None:
    choices = Choices(trees=arguments.trees, trees_choosing=-(-arguments.trees // 3))
    forest = slide_score.train(
        arguments.features, arguments.manifest, arguments.out, seed=arguments.seed, choices=choices
    )
    card = forest.card
    settings = ", ".join(f"{name} {value:g}" for name, value in card.settings._asdict().items())
    say(
        f"trained on {len(card.training)} slides of {card.n_patients} patients, {card.n_tumour} with tumour: {settings}"
    )
    say(f"AUC in cross-validation {card.auc:.4f} (95 % interval {card.auc_low:.4f} to {card.auc_high:.4f})")
    say(f"forest: {arguments.out}")


def _score(arguments: Namespace) -> None:
    slides = latest_plan(arguments.run).slides
    scores = slide_score.write_scores(
        arguments.forest, arguments.run, slides, arguments.out, also_training=arguments.also_training
    )
    say(f"scores of {len(scores)} slides: {arguments.out}")
