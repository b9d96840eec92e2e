"""The commands that work on files alone: no Hydra, no Prefect, no server.

Exit codes: 0 complete, 10 partial (only when allowed), 20 bad input, 30 environment, 40 integrity, 50 a defect.
"""

import argparse
import csv
import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wsiflow import __version__
from wsiflow.errors import EnvironmentFault, InputError, IntegrityError, WsiflowError

_SMALLEST_SYNTHETIC_PX = 1024


def say(text: str) -> None:
    """Tell the user something."""
    print(text, flush=True)  # noqa: T201 - the one place that prints


def report(error: WsiflowError) -> int:
    """Tell the user what went wrong, in one line, and return the exit code."""
    print(f"wsiflow: {error}", file=sys.stderr, flush=True)  # noqa: T201
    return error.exit_code


def main(argv: Sequence[str], answer: Callable[..., Any] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: The command and its arguments.
        answer: What ``compare`` calls in the place of `wsiflow.compare.answer`.
    """
    arguments = _parser().parse_args(argv, argparse.Namespace(answer=answer))
    command: Callable[[argparse.Namespace], int] = arguments.command
    return bounded(lambda: command(arguments))


def bounded(command: Callable[[], int]) -> int:
    """Call a command and return its exit code, whatever happens: one line for every error, of its class.

    With ``WSIFLOW_DEBUG`` set, what nobody expected ends in its traceback instead.
    """
    try:
        return command()
    except WsiflowError as error:
        return report(error)
    except OSError as error:
        if "WSIFLOW_DEBUG" in os.environ:
            raise
        return report(EnvironmentFault(str(error), "mend it and run again"))
    except Exception as error:
        if "WSIFLOW_DEBUG" in os.environ:
            raise
        remedy = "report this, with the traceback that WSIFLOW_DEBUG=1 shows"
        return report(WsiflowError(f"{type(error).__name__}: {error}", remedy))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wsiflow", description="Test AI on whole-slide images.")
    parser.add_argument("--version", action="version", version=f"wsiflow {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about, description=about)
        made.set_defaults(command=command)
        return made

    add("run", _unreachable, "the whole line: wsiflow run [overrides] [-m]; wsiflow run --help shows every key")
    one = add("evaluate", _evaluate, "score existing detections: FROC (official and strict) and slide AUC")
    one.add_argument("--manifest", type=Path, required=True, help="CSV with slide_id and label, annotation or mask")
    one.add_argument(
        "--detections", type=Path, required=True, help="folder with one <slide_id>.csv per slide: prob,x,y"
    )
    one.add_argument("--scores", type=Path, help="CSV with slide_id,score; without it the highest detection counts")
    one.add_argument("--out", type=Path, required=True, help="folder to write")
    one.add_argument("--protocol", default="own_spacing", help="own_spacing, camelyon16 (its spacing and exclusions)")
    one.add_argument("--um-px", type=float, help="level-0 spacing for every slide (CAMELYON16: 0.243)")
    one.add_argument("--downsample", type=int, help="level-0 px per evaluation mask px (32)")
    one.add_argument(
        "--mask-downsample",
        type=_positive,
        help="scale at which mask images are read; 1: they are at evaluation resolution",
    )
    one.add_argument("--bootstrap", type=int, help="resamples of the intervals (2000)")
    one.add_argument("--seed", type=_natural, default=0)
    _add_synth(add("synth", _synth, "write a synthetic data set with known lesions"))
    _add_run_commands(add)
    one = add("element", _element, "one element of an array job: what its job script calls")
    one.add_argument("table", type=Path)
    one = add("cancel", _cancel, "cancel a run's array jobs and its driver, from its folder alone")
    one.add_argument("run", type=Path)
    add("doctor", _doctor, "machine, cores, versions")
    for add_more in (_add_slide_score_commands, _add_compare, _add_compare_maps, _add_export, _add_subsample):
        add_more(add)
    return parser


def _add_compare_maps(add: Callable[..., argparse.ArgumentParser]) -> None:
    one = add("compare-maps", _compare_maps, "how far the heatmaps of two runs lie apart, and what that changes")
    one.add_argument("a", type=Path, help="folder of a run, or a heatmap")
    one.add_argument("b", type=Path, help="the same of another setting")
    one.add_argument("--threshold", type=float, default=0.5, help="a cell is positive from this score on (0.5)")
    one.add_argument("--radius-um", type=float, default=75.0, help="detections this near are one lesion (75)")
    one.add_argument("--bound", type=float, help="largest |difference| of equivalent maps: exit code 10 beyond it")
    one.add_argument("--out", type=Path, help="folder to write equivalence.md, .csv, .json and .png to")


def _add_compare(add: Callable[..., argparse.ArgumentParser]) -> None:
    one = add("compare", _compare, "what settings score and cost, with intervals, and which are worth their cost")
    one.add_argument("names", nargs="+", metavar="EXPERIMENT | RUN", help="an MLflow experiment, or folders of runs")
    one.add_argument("--sweep", help="the sweep of the experiment to compare; needed where it has several")
    one.add_argument(
        "--uri",
        default=os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///runs/mlflow.db"),
        help="MLflow store of the experiment (MLFLOW_TRACKING_URI, else sqlite:///runs/mlflow.db)",
    )
    one.add_argument("--reference", default="", help="setting the others are compared with (the one that costs most)")
    one.add_argument("--out", type=Path, default=Path("comparison"), help="folder to write (comparison)")
    one.add_argument("--bootstrap", type=_natural, default=2000, help="resamples of the intervals (2000)")
    one.add_argument("--seed", type=_natural, default=0)


def _add_synth(one: argparse.ArgumentParser) -> None:
    """Add the options of synthetic data sets."""
    one.add_argument("folder", type=Path)
    one.add_argument("--size-px", type=_positive, default=6144, help="side of the slides, at least 1024 (6144)")
    one.add_argument("--seed", type=_natural, default=0)
    one.add_argument("--like", choices=["camelyon16"], help="slides like real ones, from outlines and tissue in --data")
    one.add_argument("--data", type=Path, help="folder that holds camelyon16/ and patches/")
    one.add_argument("--slides", type=_positive, default=40, help="with --like: how many (40)")
    one.add_argument("--scale", type=_scale, default=0.25, help="with --like: size of outlines, 1 is real (0.25)")


def _add_run_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands that take a run's folder."""
    one = add("status", _status, "what a run has done, from the disk alone")
    one.add_argument("run", type=Path)
    one = add("explain", _explain, "why a task of a run is done, or is not, and every attempt at it")
    one.add_argument("run", type=Path)
    one.add_argument("task", nargs="+", help="as trace.csv names it: stage, slide, group; or a slide alone")
    add("plan", _unreachable, "what a run will take: wsiflow plan [overrides] [--workers 1,16] [--calibrate]")
    add("retry", _unreachable, "start a run again from its folder alone: what is missing is done, and nothing else")
    one = add("verify", _verify, "compare every published file of a run with its receipt")
    one.add_argument("run", type=Path)
    one = add("task", _task, "predict one array task of a plan by hand")
    one.add_argument("plan", type=Path)
    one.add_argument("index", type=int)


def _add_slide_score_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands around a forest that scores slides."""
    one = add("features", _features, "thirty features of every slide of some runs, from their heatmaps")
    one.add_argument("runs", type=Path, nargs="+")
    one.add_argument("--out", type=Path, required=True, help="CSV to write")
    one.add_argument("--reference", action="store_true", help="with the quirks of the reference system")
    one = add("forest", _unreachable, "train a random forest on features, or score the slides of a run with it")
    actions = one.add_subparsers(required=True, metavar="ACTION")
    one = actions.add_parser(
        "train", help="choose by cross-validation, grow, write; needs three patients of each class"
    )
    one.set_defaults(command=_train_forest)
    one.add_argument("--features", type=Path, required=True, help="CSV of wsiflow features")
    one.add_argument("--manifest", type=Path, required=True, help="labels, patient_id, split; test is left out")
    one.add_argument("--out", type=Path, required=True, help="JSON to write")
    one.add_argument("--trees", type=_positive, default=300, help="trees; choices are compared with a third (300)")
    one.add_argument("--seed", type=_natural, default=0)
    one = actions.add_parser("score", help="write slide_id,score for every slide of a run")
    one.set_defaults(command=_score_by_forest)
    one.add_argument("run", type=Path)
    one.add_argument("--forest", type=Path, required=True, help="JSON of wsiflow forest train")
    one.add_argument("--out", type=Path, required=True, help="CSV to write, for wsiflow evaluate --scores")
    one.add_argument("--also-training", action="store_true", help="score slides too that the forest was trained on")


def _add_export(add: Callable[..., argparse.ArgumentParser]) -> None:
    kinds = add(
        "export", _unreachable, "a run for reviewers: iMRMC text, case list, calibration, subgroups, repeat.json"
    )
    formats = kinds.add_subparsers(required=True, metavar="FORMAT")
    one = formats.add_parser("imrmc", help="slide scores of runs over the same cases, as iMRMC reads them")
    one.set_defaults(command=_export_imrmc)
    one.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run: one modality")
    one.add_argument("--names", type=_names, default=(), help="names of the modalities, separated by commas")
    one.add_argument("--out", type=Path, required=True, help="file to write")
    one = formats.add_parser("regulatory", help="everything about one run, in a folder")
    one.set_defaults(command=_export_regulatory)
    one.add_argument("run", type=Path, metavar="RUN")
    one.add_argument("--out", type=Path, required=True, help="folder to write")
    one.add_argument("--subgroups", type=_names, default=(), help="columns of the manifest, separated by commas")
    one.add_argument("--table", type=Path, help="CSV with slide_id and more columns to make subgroups of")
    one.add_argument("--threshold", type=float, default=0.5, help="a slide is positive from this score on (0.5)")
    one.add_argument("--no-cells", action="store_true", help="calibrate slide scores alone: reads no heatmap")


def _add_subsample(add: Callable[..., argparse.ArgumentParser]) -> None:
    one = add("subsample", _subsample, "what a run would score at coarser strides, from its own heatmaps")
    one.add_argument("run", type=Path)
    one.add_argument("--stride", type=_strides, required=True, help="reading px, separated by commas")
    one.add_argument("--out", type=Path, required=True, help="folder that gets one for each stride")


def _strides(text: str) -> tuple[int, ...]:
    """Return whole numbers that are separated by commas."""
    return tuple(_positive(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    """Return names that are separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _natural(text: str) -> int:
    """Return a whole number from 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def _positive(text: str) -> int:
    """Return a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _scale(text: str) -> float:
    """Return a number above 0 and at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0 and at most 1")
    return value


def _unreachable(_arguments: argparse.Namespace) -> int:
    """Stand in the help for what `wsiflow.flows` does; those commands never get here."""
    raise AssertionError


def _evaluate(arguments: argparse.Namespace) -> int:
    from wsiflow import evaluation
    from wsiflow.config import evaluation_params

    changes = {"downsample": arguments.downsample, "l0_um_px": arguments.um_px, "bootstrap": arguments.bootstrap}
    params = evaluation_params(arguments.protocol, changes)
    existing = evaluation.Existing(
        arguments.manifest, arguments.detections, arguments.scores, arguments.mask_downsample
    )
    scores = evaluation.evaluate_existing(existing, params, seed=arguments.seed, out=arguments.out)
    say(f"protocol {params.name} {params.protocol_hash()[:12]}")
    for name, value in scores.metrics.items():
        say(f"{name} {value:.6f}")
    return 0


def _synth(arguments: argparse.Namespace) -> int:
    from wsiflow import publish, synth

    if arguments.like:
        if arguments.data is None:
            raise InputError("--like needs --data", "name the folder that holds camelyon16/ and patches/")
        publish.preflight(arguments.folder)
        written = synth.write_like(
            arguments.folder, arguments.data, slides=arguments.slides, scale=arguments.scale, seed=arguments.seed
        )
        say(f"manifest: {written}")
        return 0
    if arguments.size_px < _SMALLEST_SYNTHETIC_PX:
        cause = f"slides of {arguments.size_px} px are too small for tissue and lesions"
        raise InputError(cause, f"give --size-px of at least {_SMALLEST_SYNTHETIC_PX}")
    publish.preflight(arguments.folder)
    say(f"manifest: {synth.write_dataset(arguments.folder, size_px=arguments.size_px, seed=arguments.seed)}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from wsiflow import ledger, plan

    made = plan.latest(arguments.run)
    balance = ledger.balance(arguments.run, made)
    say(f"plan {made.hash[:12]}: {len(made.slides)} slides, {made.n_groups} tasks")
    say(
        f"planned {balance.planned} = published {balance.published} + quarantined {balance.quarantined}"
        f" + not done {balance.failed}"
    )
    listed = arguments.run / "process_list.csv"
    if listed.exists():
        with listed.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                say(f"{row['slide_id']}: {row['status']}{': ' + row['reason'] if row['reason'] else ''}")
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    from wsiflow import explain

    for line in explain.explain(arguments.run, arguments.task):
        say(line)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from wsiflow import publish

    receipts = sorted((arguments.run / publish.RECEIPTS).rglob("*.json"))
    if not receipts:
        raise InputError("it holds no receipts", "name the out= folder of a run", path=arguments.run)
    damaged = 0
    for path in receipts:
        name = str(path.relative_to(arguments.run / publish.RECEIPTS)).removesuffix(".json")
        try:
            publish.check(arguments.run, publish.read_receipt(arguments.run, name) or {"path": name})
        except IntegrityError as error:
            damaged += 1
            report(error)
    say(f"{len(receipts) - damaged} of {len(receipts)} published files are what their receipts say")
    return IntegrityError.exit_code if damaged else 0


def _task(arguments: argparse.Namespace) -> int:
    from wsiflow import plan
    from wsiflow.model import threads

    made = plan.read(arguments.plan)
    if not 0 <= arguments.index < made.n_groups:
        raise InputError(f"there is no task {arguments.index}, the plan has {made.n_groups}", "count from 0")
    threads.limit_threads(int(made.settings["predict"]["numeric_class"]["threads"]))
    from wsiflow import reading, steps

    if reading.fits_slides(reading.stain_params(made)):  # done already where the run has come so far
        outcome = steps.run_task(arguments.plan, "stain", made.task("predict", arguments.index).slide)
        if outcome.receipt is None:
            say(outcome.error)
            return outcome.exit_code
    outcome = steps.run_task(arguments.plan, "predict", arguments.index)
    say(outcome.error or f"published {(outcome.receipt or {})['path']}")
    return outcome.exit_code


def _element(arguments: argparse.Namespace) -> int:
    from wsiflow.executor import element

    return element.run(arguments.table)


def _cancel(arguments: argparse.Namespace) -> int:
    from wsiflow.executor import jobs

    for sentence in jobs.cancel(arguments.run):
        say(sentence)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from wsiflow import compare

    options = compare.Options(arguments.reference, arguments.bootstrap, arguments.seed)
    wanted = compare.asked(arguments.names, arguments.uri, arguments.sweep, options)
    say(compare.told((arguments.answer or compare.answer)(wanted, arguments.out)))
    return 0


def _doctor(_arguments: argparse.Namespace) -> int:
    from wsiflow import provenance
    from wsiflow.model import threads

    say(f"python {platform.python_version()} on {platform.platform()}")
    say(f"cores this process may use: {threads.allocated_cores()}")
    say(f"numeric class: {threads.numeric_class(1)}")
    say(f"free space here: {shutil.disk_usage('.').free / 1e9:.1f} GB")
    for name, found in provenance.versions().items():
        say(f"{name} {found}")
    return 0


def _features(arguments: argparse.Namespace) -> int:
    from wsiflow import slide_score

    count = slide_score.write_features(arguments.runs, arguments.out, reference=arguments.reference)
    say(f"features of {count} slides: {arguments.out}")
    return 0


def _train_forest(arguments: argparse.Namespace) -> int:
    from wsiflow import slide_score
    from wsiflow.forest import Choices

    choices = Choices(trees=arguments.trees, trees_choosing=-(-arguments.trees // 3))
    made = slide_score.train(
        arguments.features, arguments.manifest, arguments.out, seed=arguments.seed, choices=choices
    )
    card = made.card
    chosen = ", ".join(f"{name} {value:g}" for name, value in card.settings._asdict().items())
    say(f"trained on {len(card.training)} slides of {card.n_patients} patients, {card.n_tumour} with tumour: {chosen}")
    say(f"AUC in cross-validation {card.auc:.4f} (95 % interval {card.auc_low:.4f} to {card.auc_high:.4f})")
    say(f"forest: {arguments.out}")
    return 0


def _score_by_forest(arguments: argparse.Namespace) -> int:
    from wsiflow import slide_score

    scores = slide_score.write_scores(
        arguments.forest, arguments.run, arguments.out, also_training=arguments.also_training
    )
    say(f"scores of {len(scores)} slides: {arguments.out}")
    return 0


def _compare_maps(arguments: argparse.Namespace) -> int:
    from wsiflow import compare_maps, maps_report

    bound = arguments.bound
    if bound is not None and not 0 <= bound <= 1:
        raise InputError(f"the bound is {bound}", "give a difference of probabilities, 0 to 1")
    made = compare_maps.compare(arguments.a, arguments.b, threshold=arguments.threshold, radius_um=arguments.radius_um)
    say(maps_report.table(made))
    say(compare_maps.sentence(made))
    if arguments.out is not None:
        maps_report.write(made, arguments.out)
        say(f"written    {arguments.out / 'equivalence.md'}")
    if bound is None:
        return 0
    reasons = compare_maps.verdict(made, bound)
    say(f"NOT EQUIVALENT within {bound:g}: {'; '.join(reasons)}" if reasons else f"equivalent within {bound:g}")
    return compare_maps.NOT_EQUIVALENT if reasons else 0


def _subsample(arguments: argparse.Namespace) -> int:
    from wsiflow import subsampled

    for folder in subsampled.write(arguments.run, arguments.stride, arguments.out):
        say(f"scores     {folder / 'evaluation/summary.json'}")
    return 0


def _export_imrmc(arguments: argparse.Namespace) -> int:
    from wsiflow import regulatory

    n_cases = regulatory.export_imrmc(arguments.runs, arguments.names, arguments.out)
    say(f"{len(arguments.runs)} modalities, {n_cases} cases: {arguments.out}")
    return 0


def _export_regulatory(arguments: argparse.Namespace) -> int:
    from wsiflow import regulatory

    cells = not arguments.no_cells
    asked = regulatory.Asked(arguments.subgroups, arguments.table, arguments.threshold, cells)
    for line in regulatory.export(arguments.run, arguments.out, asked):
        say(line)
    return 0
