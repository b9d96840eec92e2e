"""Random forest: from the features of a slide to the probability that it holds tumour.

Input: features (n, 30) of `features.describe` for each threshold, labels, and who the slides belong to. Output: a
`Forest`, which predicts by arrays of its own and is kept in one JSON file: no pickle, nothing that runs when it is
read.

What a forest is like, the threshold of its regions included, is chosen by cross-validation on the training slides:
folds have both classes alike, and slides of one patient stay together. The area under the ROC curve that is told was
measured one level further out: each fold is scored by a forest that was chosen, as well as grown, without it. The
highest area among the choices would be too good, and that of a test set would no longer be one of a test set.

scikit-learn grows the trees. It is imported where that is done: scoring needs none of it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import InputError, IntegrityError
from wsiflow.evaluation import roc
from wsiflow.heatmap import features
from wsiflow.system import faults, publish

FORMAT = "wsiflow forest 1"
CELL_TOLERANCE = 0.1
"""Relative difference up to which two sizes of heatmap cells are the same."""

_LARGEST = float(np.finfo(np.float32).max)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Settings(NamedTuple):
    """What a forest is like.

    Attributes:
        threshold: Threshold of the regions that its features are of.
        max_features: Features that a split may choose from.
        max_depth: Deepest level of a tree.
        min_leaf: Fewest training slides in a leaf.
    """

    threshold: float
    max_features: int
    max_depth: int
    min_leaf: int


class Choices(NamedTuple):
    """What is chosen from, and how.

    Attributes:
        max_features, max_depth, min_leaf: See `Settings`; every combination with every threshold is tried.
        trees: Trees of a forest.
        trees_choosing: Trees of the forests that are compared.
        folds: Most folds of a cross-validation; fewer where a class has fewer patients.
    """

    max_features: tuple[int, ...] = (5, 20)
    max_depth: tuple[int, ...] = (10,)
    min_leaf: tuple[int, ...] = (1, 3)
    trees: int = 300
    trees_choosing: int = 100
    folds: int = 5


class Sample(NamedTuple):
    """Slides to learn from.

    Attributes:
        slide_ids: Their names.
        labels: int64 (n,), 1 tumour, 0 normal.
        groups: The patient of each; slides of one group are never parted.
        features: float64 (n, 30) by threshold.
        version: What the features are, see `version_of`.
        cell_um: Side of the heatmaps' cells, um.
    """

    slide_ids: tuple[str, ...]
    labels: Ints
    groups: tuple[str, ...]
    features: Mapping[float, Floats]
    version: str
    cell_um: float

    def part(self, index: Ints) -> "Sample":
        """Return some of the slides."""
        ids, groups = (tuple(values[i] for i in index) for values in (self.slide_ids, self.groups))
        kept = {threshold: values[index] for threshold, values in self.features.items()}
        return self._replace(slide_ids=ids, labels=self.labels[index], groups=groups, features=kept)


class Trees(NamedTuple):
    """Trees as arrays over the nodes of all of them.

    Attributes:
        roots: int64 (t,), node at which each tree begins.
        feature: int64 (m,), feature that a node looks at; -1 in a leaf.
        threshold: float64 (m,), a value up to this goes left.
        left, right: int64 (m,), the next node.
        value: float64 (m,), share of tumour among the training slides that came here.
    """

    roots: Ints
    feature: Ints
    threshold: Floats
    left: Ints
    right: Ints
    value: Floats


class Card(NamedTuple):
    """What is known about a forest.

    Attributes:
        version: What its features are, see `version_of`.
        settings: What was chosen.
        trees: How many there are.
        cell_um: Side of the heatmap cells it was trained on.
        training: The slides it was trained on.
        n_tumour: How many of them hold tumour.
        n_patients: How many patients they are of.
        folds: Folds of the validation.
        auc, auc_low, auc_high: Area under the ROC curve of its training slides, each scored by a forest that was chosen
            and grown without it, and the DeLong 95 % interval, which takes slides for independent.
        tried: Each choice and the area by which it was chosen, or not.
        seed: Seed of folds and trees.
        scikit_learn: Version that grew the trees.
    """

    version: str
    settings: Settings
    trees: int
    cell_um: float
    training: tuple[str, ...]
    n_tumour: int
    n_patients: int
    folds: int
    auc: float
    auc_low: float
    auc_high: float
    tried: tuple[tuple[Settings, float], ...]
    seed: int
    scikit_learn: str


class Forest(NamedTuple):
    """A forest and what is known about it."""

    card: Card
    trees: Trees

    def predict(self, rows: Floats) -> Floats:
        """Return the score of each slide, see `predict`."""
        return predict(self.trees, rows)


def version_of(*, reference: bool) -> str:
    """Return what identifies the features: their formulas, with or without the reference's quirks."""
    return "reference-1" if reference else "1"


def is_same_cell(cell_um: float, other_um: float) -> bool:
    """Tell whether two sizes of heatmap cells are near enough for one forest."""
    return abs(cell_um / other_um - 1) <= CELL_TOLERANCE


def train(sample: Sample, *, seed: int, choices: Choices | None = None) -> Forest:
    """Choose a forest by cross-validation, measure what such a choice is worth, and grow it on all slides.

    Args:
        sample: The training slides, and no other.
        seed: Seed of folds and trees; the same gives the same forest.
        choices: What to choose from.

    Raises:
        InputError: A class has slides of fewer than three patients, or a feature is not finite.
    """
    import sklearn

    choices = choices or Choices()
    scores = _validated(sample, choices, seed)
    low, high = roc.auc_interval(scores, sample.labels)
    chosen, tried = _choose(sample, choices, seed)
    card = Card(
        version=sample.version,
        settings=chosen,
        trees=choices.trees,
        cell_um=sample.cell_um,
        training=sample.slide_ids,
        n_tumour=int(sample.labels.sum()),
        n_patients=len(set(sample.groups)),
        folds=_n_folds(sample, choices.folds),
        auc=roc.auc(scores, sample.labels),
        auc_low=low,
        auc_high=high,
        tried=tried,
        seed=seed,
        scikit_learn=sklearn.__version__,
    )
    return Forest(card, _grown(sample, chosen, choices.trees, seed))


def grow(rows: Floats, labels: Ints, settings: Settings, *, trees: int, seed: int) -> Trees:
    """Grow a forest on all the slides given.

    Args:
        rows: float64 (n, 30), features at the threshold of the settings.
        labels: int64 (n,).
        settings: What the forest is like.
        trees: How many trees.
        seed: Their seed.

    Raises:
        InputError: There is only one class, or a feature is not finite.
    """
    from sklearn.ensemble import RandomForestClassifier

    _check(rows)
    if len(set(labels.tolist())) != 2:
        raise InputError("slides of one class only", "give tumour and normal slides", stage="forest")
    grown = RandomForestClassifier(
        n_estimators=trees,
        max_features=settings.max_features,
        max_depth=settings.max_depth,
        min_samples_leaf=settings.min_leaf,
        random_state=seed,
    ).fit(rows, labels)
    return _joined([_arrays(tree.tree_) for tree in grown.estimators_])


def predict(trees: Trees, rows: Floats) -> Floats:
    """Return the probability of tumour: the mean of what the trees say.

    The features are compared in float32 and the trees added up one by one, as scikit-learn does, so that both give the
    same bits.

    Args:
        trees: The forest.
        rows: float64 (n, 30).

    Returns:
        float64 (n,).

    Raises:
        InputError: A feature is not finite, or there are not 30 of them.
    """
    _check(rows)
    values = rows.astype(np.float32)
    slides = np.arange(len(values))[:, np.newaxis]
    at = np.tile(trees.roots, (len(values), 1))
    while (inner := trees.feature[at] >= 0).any():
        goes_left = values[slides, trees.feature[at]] <= trees.threshold[at]
        at = np.where(inner, np.where(goes_left, trees.left[at], trees.right[at]), at)
    total: Floats = np.cumsum(trees.value[at], axis=1)[:, -1] / len(trees.roots)
    return total


def save(forest: Forest, path: Path) -> None:
    """Write a forest as JSON, whole or not at all.

    Raises:
        EnvironmentFault: It cannot be written.
    """
    card = forest.card._asdict() | {
        "settings": forest.card.settings._asdict(),
        "tried": [settings._asdict() | {"auc": auc} for settings, auc in forest.card.tried],
    }
    content = {"card": card, "trees": {name: values.tolist() for name, values in forest.trees._asdict().items()}}
    document = {"format": FORMAT, "sha256": publish.key_of(**content), **content}
    publish.write_view(path.parent, path.name, (json.dumps(document, separators=(",", ":")) + "\n").encode())


def load(path: Path) -> Forest:
    """Read what `save` wrote.

    Raises:
        InputError: The file cannot be read, or is no forest of this format.
        IntegrityError: Its content is not what its hash says, or its nodes are no trees.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise faults.unreadable(
            error, "the forest", "name a file that is there, or train it again", path=path
        ) from error
    except ValueError as error:
        raise InputError(f"not a readable forest ({error})", "train it again", path=path) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        cause = f"the format is not {FORMAT!r}"
        raise InputError(cause, "give a file that wsiflow forest train wrote", path=path)
    content = {name: found.get(name) for name in ("card", "trees")}
    if publish.key_of(**content) != found.get("sha256"):
        raise IntegrityError("its content is not what its hash says", "train it again", path=path)
    try:
        return Forest(_card(found["card"]), _trees(found["trees"], path))
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"its content is incomplete ({error})", "train it again", path=path) from error


def _card(found: dict[str, Any]) -> Card:
    tried = [dict(each) for each in found["tried"]]
    return Card(
        **found
        | {
            "settings": Settings(**found["settings"]),
            "training": tuple(found["training"]),
            "tried": tuple((Settings(**each), auc) for each in tried for auc in [each.pop("auc")]),
        }
    )


def _trees(found: dict[str, Any], path: Path) -> Trees:
    """Return the arrays; each node must lead to later ones, so that every walk through them ends."""
    whole, fractions = np.int64, np.float64
    kinds = Trees(whole, whole, fractions, whole, whole, fractions)._asdict()  # type: ignore[arg-type]
    trees = Trees(**{name: np.asarray(found[name], kind) for name, kind in kinds.items()})
    nodes = np.arange(len(trees.feature))
    inner = trees.feature >= 0
    sound = (
        len(trees.roots) > 0
        and all(len(values) == len(nodes) for values in trees[1:])
        and bool(((trees.roots >= 0) & (trees.roots < len(nodes))).all())
        and bool((trees.feature < len(features.NAMES)).all())
        and all(bool(((each > nodes) & (each < len(nodes)))[inner].all()) for each in (trees.left, trees.right))
    )
    if not sound:
        raise IntegrityError("its nodes are no trees", "train it again", path=path)
    return trees


# --- choosing


def _validated(sample: Sample, choices: Choices, seed: int) -> Floats:
    """Return the score of each slide by a forest chosen and grown without its fold."""
    scores = np.full(len(sample.labels), np.nan)
    for inside, outside in _folds(sample, choices.folds, seed):
        part = sample.part(inside)
        chosen, _ = _choose(part, choices, seed)
        grown = _grown(part, chosen, choices.trees, seed)
        scores[outside] = predict(grown, sample.features[chosen.threshold][outside])
    return scores


def _choose(sample: Sample, choices: Choices, seed: int) -> tuple[Settings, tuple[tuple[Settings, float], ...]]:
    """Return the settings with the highest area over all held-out slides, of equal ones the first; and all tried."""
    options = product(sorted(sample.features), choices.max_features, choices.max_depth, choices.min_leaf)
    folds = list(_folds(sample, choices.folds, seed))
    tried = tuple(
        (settings, _held_out_auc(sample, settings, folds, choices, seed)) for settings in map(Settings._make, options)
    )
    return max(tried, key=lambda each: each[1])[0], tried


def _held_out_auc(
    sample: Sample, settings: Settings, folds: Sequence[tuple[Ints, Ints]], choices: Choices, seed: int
) -> float:
    scores = np.full(len(sample.labels), np.nan)
    for inside, outside in folds:
        grown = _grown(sample.part(inside), settings, choices.trees_choosing, seed)
        scores[outside] = predict(grown, sample.features[settings.threshold][outside])
    return roc.auc(scores, sample.labels)


def _folds(sample: Sample, most: int, seed: int) -> Iterator[tuple[Ints, Ints]]:
    """Yield which slides are inside and outside of each fold."""
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(_n_folds(sample, most), shuffle=True, random_state=seed)
    yield from splitter.split(np.zeros(len(sample.labels)), sample.labels, sample.groups)


def _n_folds(sample: Sample, most: int) -> int:
    """Return how many folds there can be: each needs a patient of either class.

    Raises:
        InputError: There are fewer than two.
    """
    patients = [
        len({group for group, label in zip(sample.groups, sample.labels, strict=True) if label == kind})
        for kind in (0, 1)
    ]
    if min(patients) < 2:
        cause = f"{patients[1]} patients with tumour and {patients[0]} without in a part of the training slides"
        remedy = "train on at least three patients of each class; where there are, on more, or with another --seed"
        raise InputError(cause, remedy, stage="forest")
    return min(most, *patients)


# --- trees


def _grown(sample: Sample, settings: Settings, trees: int, seed: int) -> Trees:
    return grow(sample.features[settings.threshold], sample.labels, settings, trees=trees, seed=seed)


def _arrays(tree: Any) -> Trees:
    """Return one tree of scikit-learn's; in a leaf both children are the node itself."""
    nodes = np.arange(tree.node_count)
    leaf = tree.children_left < 0
    return Trees(
        np.zeros(1, np.int64),
        np.where(leaf, -1, tree.feature).astype(np.int64),
        np.where(leaf, 0.0, tree.threshold),
        np.where(leaf, nodes, tree.children_left).astype(np.int64),
        np.where(leaf, nodes, tree.children_right).astype(np.int64),
        tree.value[:, 0, 1].astype(np.float64),
    )


def _joined(trees: Sequence[Trees]) -> Trees:
    """Return many trees as one, their nodes renumbered."""
    first = np.cumsum([0, *(len(tree.feature) for tree in trees)])[:-1]
    moved = [
        tree._replace(roots=tree.roots + start, left=tree.left + start, right=tree.right + start)
        for tree, start in zip(trees, first.tolist(), strict=True)
    ]
    return Trees(*(np.concatenate(values) for values in zip(*moved, strict=True)))


def _check(rows: Floats) -> None:
    odd = ~(np.abs(rows) <= _LARGEST)  # True for NaN
    if rows.ndim != 2 or rows.shape[1] != len(features.NAMES) or odd.any():
        cause = f"features of shape {rows.shape}, {int(odd.sum())} of them not finite in float32"
        raise InputError(cause, f"give {len(features.NAMES)} finite numbers for each slide", stage="forest")
