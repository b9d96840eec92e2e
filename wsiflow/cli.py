"""The commands that work on files alone: no Hydra, no Prefect, no server.

Exit codes: 0 complete, 10 partial (only when allowed), 20 bad input, 30 environment, 40 integrity, 50 a defect.
"""

import argparse
import csv
import json
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from wsiflow import __version__
from wsiflow.errors import InputError, IntegrityError, WsiflowError


def say(text: str) -> None:
    """Tell the user something."""
    print(text, flush=True)  # noqa: T201 - the one place that prints


def report(error: WsiflowError) -> int:
    """Tell the user what went wrong, in one line, and return the exit code."""
    print(f"wsiflow: {error}", file=sys.stderr, flush=True)  # noqa: T201
    return error.exit_code


def main(argv: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except WsiflowError as error:
        return report(error)


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
    one.add_argument("--um-px", type=float, help="level-0 spacing for every slide (CAMELYON16: 0.243)")
    one.add_argument("--downsample", type=int, default=32, help="level-0 px per evaluation mask px (32)")
    one.add_argument(
        "--mask-downsample", type=int, help="scale at which mask images are read; 1: they are at evaluation resolution"
    )
    one.add_argument("--bootstrap", type=int, default=1000, help="resamples of the FROC interval (1000)")
    one.add_argument("--seed", type=int, default=0)
    one = add("synth", _synth, "write a synthetic data set with known lesions")
    one.add_argument("folder", type=Path)
    one.add_argument("--size-px", type=int, default=6144, help="side of the slides (6144)")
    one.add_argument("--seed", type=int, default=0)
    one = add("status", _status, "what a run has done, from the disk alone")
    one.add_argument("run", type=Path)
    one = add("verify", _verify, "compare every published file of a run with its receipt")
    one.add_argument("run", type=Path)
    one = add("task", _task, "predict one array task of a plan: what an array job's element calls")
    one.add_argument("plan", type=Path)
    one.add_argument("index", type=int)
    add("doctor", _doctor, "machine, cores, versions")
    return parser


def _unreachable(_arguments: argparse.Namespace) -> int:
    """Stand for ``run`` in the help; the command itself never gets here."""
    raise AssertionError


def _evaluate(arguments: argparse.Namespace) -> int:
    from wsiflow import dataset, evaluation, publish
    from wsiflow.config import EvaluationParams

    params = EvaluationParams(downsample=arguments.downsample, l0_um_px=arguments.um_px, bootstrap=arguments.bootstrap)
    scores = evaluation.evaluate_folder(
        dataset.read_manifest(arguments.manifest),
        arguments.detections,
        params,
        seed=arguments.seed,
        scores=arguments.scores,
        mask_downsample=arguments.mask_downsample,
    )
    publish.preflight(arguments.out)
    for name, text in evaluation.documents(scores).items():
        publish.write_view(arguments.out, name, text)
    for name, value in scores.metrics.items():
        say(f"{name} {value:.6f}")
    return 0


def _synth(arguments: argparse.Namespace) -> int:
    from wsiflow import synth

    say(f"manifest: {synth.write_dataset(arguments.folder, size_px=arguments.size_px, seed=arguments.seed)}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from wsiflow import plan, publish, shards

    files = publish.generations(arguments.run, "plan.json")
    if not files:
        raise InputError("it holds no plan", "name the out= folder of a run", path=arguments.run)
    made = plan.read(files[-1])
    balance = shards.ledger(arguments.run, made)
    say(f"plan {made.hash[:12]}: {len(made.slides)} slides, {len(made.tasks)} tasks")
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


def _verify(arguments: argparse.Namespace) -> int:
    from wsiflow import publish

    receipts = sorted((arguments.run / publish.RECEIPTS).rglob("*.json"))
    if not receipts:
        raise InputError("it holds no receipts", "name the out= folder of a run", path=arguments.run)
    damaged = 0
    for path in receipts:
        try:
            publish.check(arguments.run, json.loads(path.read_text(encoding="utf-8")))
        except IntegrityError as error:
            damaged += 1
            report(error)
    say(f"{len(receipts) - damaged} of {len(receipts)} published files are what their receipts say")
    return IntegrityError.exit_code if damaged else 0


def _task(arguments: argparse.Namespace) -> int:
    from wsiflow import plan
    from wsiflow.model import threads

    made = plan.read(arguments.plan)
    if not 0 <= arguments.index < len(made.tasks):
        raise InputError(f"there is no task {arguments.index}, the plan has {len(made.tasks)}", "count from 0")
    threads.limit_threads(int(made.settings["predict"]["numeric_class"]["threads"]))
    from wsiflow import steps

    outcome = steps.run_task(arguments.plan, "predict", arguments.index)
    say(outcome.error or f"published {(outcome.receipt or {})['path']}")
    return outcome.exit_code


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
