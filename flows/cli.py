"""The commands that work on files alone, and their options: no Hydra, no Prefect, no server."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wsiflow import __version__

from . import commands, logs
from .terminal import bounded


def main(argv: Sequence[str], answer: Callable[..., Any] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: The command and its arguments.
        answer: What ``compare`` calls in the place of `wsiflow.analysis.tradeoff.comparison.answer`.
    """
    arguments = _parser().parse_args(argv, argparse.Namespace(answer=answer))
    command: Callable[[argparse.Namespace], int] = arguments.command
    return bounded(lambda: command(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wsiflow", description="Test AI on whole-slide images.", epilog=logs.OPTIONS)
    parser.add_argument("--version", action="version", version=f"wsiflow {__version__}")
    names = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        made = names.add_parser(name, help=about, description=about)
        made.set_defaults(command=command)
        return made

    add("run", _unreachable, "the whole line: wsiflow run [overrides] [-m]; wsiflow run --help shows every key")
    one = add("evaluate", commands.evaluate, "score existing detections: FROC (official and strict) and slide AUC")
    one.add_argument("--manifest", type=Path, required=True, help="CSV: slide_id, path, and label, annotation or mask")
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
    one.add_argument(
        "--mask-tumour", type=int, nargs="+", metavar="VALUE", help="values of mask images that are tumour, no other is"
    )
    one.add_argument("--bootstrap", type=int, help="resamples of the intervals (2000)")
    one.add_argument("--seed", type=_natural, default=0)
    _add_synth(add("synth", commands.synth, "write a synthetic data set with known lesions"))
    _add_run_commands(add)
    one = add("element", commands.element, "one element of an array job: what its job script calls")
    one.add_argument("table", type=Path)
    one = add("cancel", commands.cancel, "cancel a run's array jobs and its driver, from its folder alone")
    one.add_argument("run", type=Path)
    add("doctor", commands.doctor, "machine, cores, versions")
    for add_more in (_add_slide_score_commands, _add_compare, _add_compare_maps, _add_export, _add_subsample):
        add_more(add)
    return parser


def _add_compare_maps(add: Callable[..., argparse.ArgumentParser]) -> None:
    one = add(
        "compare-maps", commands.compare_maps, "how far the heatmaps of two runs lie apart, and what that changes"
    )
    one.add_argument("a", type=Path, help="folder of a run, or a heatmap")
    one.add_argument("b", type=Path, help="the same of another setting")
    one.add_argument("--threshold", type=float, default=0.5, help="a cell is positive from this score on (0.5)")
    one.add_argument("--radius-um", type=float, default=75.0, help="detections this near are one lesion (75)")
    one.add_argument("--bound", type=float, help="largest |difference| of equivalent maps: exit code 10 beyond it")
    one.add_argument("--out", type=Path, help="folder to write equivalence.md, .csv, .json and .png to")


def _add_compare(add: Callable[..., argparse.ArgumentParser]) -> None:
    one = add(
        "compare", commands.compare, "what settings score and cost, with intervals, and which are worth their cost"
    )
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
    one = add("status", commands.status, "what a run has done, from the disk alone")
    one.add_argument("run", type=Path)
    one = add("explain", commands.explain, "why a task of a run is done, or is not, and every attempt at it")
    one.add_argument("run", type=Path)
    one.add_argument("task", nargs="+", help="as trace.csv names it: stage, slide, group; or a slide alone")
    add("plan", _unreachable, "what a run will take: wsiflow plan [overrides] [--workers 1,16] [--calibrate]")
    add("retry", _unreachable, "start a run again from its folder alone: what is missing is done, and nothing else")
    one = add("verify", commands.verify, "compare every published file of a run with its receipt")
    one.add_argument("run", type=Path)
    one = add("task", commands.task, "predict one array task of a plan by hand")
    one.add_argument("plan", type=Path)
    one.add_argument("index", type=int)


def _add_slide_score_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands around a forest that scores slides."""
    one = add("features", commands.features, "thirty features of every slide of some runs, from their heatmaps")
    one.add_argument("runs", type=Path, nargs="+")
    one.add_argument("--out", type=Path, required=True, help="CSV to write")
    one.add_argument("--reference", action="store_true", help="with the quirks of the reference system")
    one = add("forest", _unreachable, "train a random forest on features, or score the slides of a run with it")
    actions = one.add_subparsers(required=True, metavar="ACTION")
    one = actions.add_parser(
        "train", help="choose by cross-validation, grow, write; needs three patients of each class"
    )
    one.set_defaults(command=commands.train_forest)
    one.add_argument("--features", type=Path, required=True, help="CSV of wsiflow features")
    one.add_argument(
        "--manifest",
        type=Path,
        required=True,
        help="CSV with slide_id, path, label, split",
    )
    one.add_argument("--out", type=Path, required=True, help="JSON to write")
    one.add_argument("--trees", type=_positive, default=300, help="trees; choices are compared with a third (300)")
    one.add_argument("--seed", type=_natural, default=0)
    one = actions.add_parser("score", help="write slide_id,score for every slide of a run")
    one.set_defaults(command=commands.score_by_forest)
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
    one.set_defaults(command=commands.export_imrmc)
    one.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run: one modality")
    one.add_argument("--names", type=_names, default=(), help="names of the modalities, separated by commas")
    one.add_argument("--out", type=Path, required=True, help="file to write")
    one = formats.add_parser("regulatory", help="everything about one run, in a folder")
    one.set_defaults(command=commands.export_regulatory)
    one.add_argument("run", type=Path, metavar="RUN")
    one.add_argument("--out", type=Path, required=True, help="folder to write")
    one.add_argument("--subgroups", type=_names, default=(), help="columns of the manifest, separated by commas")
    one.add_argument("--table", type=Path, help="CSV with slide_id and more columns to make subgroups of")
    one.add_argument("--threshold", type=float, default=0.5, help="a slide is positive from this score on (0.5)")
    one.add_argument("--no-cells", action="store_true", help="calibrate slide scores alone: reads no heatmap")


def _add_subsample(add: Callable[..., argparse.ArgumentParser]) -> None:
    one = add("subsample", commands.subsample, "what a run would score at coarser strides, from its own heatmaps")
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
