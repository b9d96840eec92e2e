"""What each command on files does: arguments in, sentences and an exit code out. `flows.cli` has their options.

Modules are imported where they are used, so that no command waits for another's.
"""

import argparse
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from wsiflow.errors import InputError, IntegrityError

from .terminal import report, say

if TYPE_CHECKING:
    from wsiflow.run.plan import Plan

_SMALLEST_SYNTHETIC_PX = 1024


def evaluate(arguments: argparse.Namespace) -> int:
    """Score detections that are there already."""
    from wsiflow.evaluation.evaluate import Existing, evaluate_existing
    from wsiflow.run.config import evaluation_params

    changes = {"downsample": arguments.downsample, "l0_um_px": arguments.um_px, "bootstrap": arguments.bootstrap}
    changes["mask_tumour"] = arguments.mask_tumour
    params = evaluation_params(arguments.protocol, changes)
    existing = Existing(arguments.manifest, arguments.detections, arguments.scores, arguments.mask_downsample)
    scores = evaluate_existing(existing, params, seed=arguments.seed, out=arguments.out)
    say(f"protocol {params.name} {params.protocol_hash()[:12]}")
    for name, value in scores.metrics.items():
        say(f"{name} {value:.6f}")
    return 0


def synth(arguments: argparse.Namespace) -> int:
    """Write a synthetic data set."""
    from wsiflow.slides.synthetic import dataset
    from wsiflow.system import publish

    if arguments.like:
        if arguments.data is None:
            raise InputError("--like needs --data", "name the folder that holds camelyon16/ and patches/")
        publish.preflight(arguments.folder)
        written = dataset.write_like(
            arguments.folder, arguments.data, slides=arguments.slides, scale=arguments.scale, seed=arguments.seed
        )
        say(f"manifest: {written}")
        return 0
    if arguments.size_px < _SMALLEST_SYNTHETIC_PX:
        cause = f"slides of {arguments.size_px} px are too small for tissue and lesions"
        raise InputError(cause, f"give --size-px of at least {_SMALLEST_SYNTHETIC_PX}")
    publish.preflight(arguments.folder)
    say(f"manifest: {dataset.write_dataset(arguments.folder, size_px=arguments.size_px, seed=arguments.seed)}")
    return 0


def status(arguments: argparse.Namespace) -> int:
    """Say what a run has done, whether it is complete, and who runs it."""
    import json

    from wsiflow.run.executor import driver
    from wsiflow.run.stages import ingest
    from wsiflow.run.stages.line import ingested
    from wsiflow.system import publish, tables

    root = arguments.run
    told = ingest.told(root)
    if told is None:
        raise InputError(*_no_run(root), path=root)
    cases = json.loads(told.read_text(encoding="utf-8"))["cases"]
    plans = publish.generations(root, "plan.json")
    n_looked = ingested(root, (case["slide_id"] for case in cases))
    if not plans:
        say("there is no plan yet")
        say(f"ingest {n_looked} of {len(cases)}")
    lacks = _planned_told(root, plans[-1], n_looked) if plans else ["a plan"]
    say(f"not complete: it lacks {', '.join(lacks)}" if lacks else "complete")
    for sentence in driver.told(root):
        say(sentence)
    listed = root / "process_list.csv"
    if listed.exists():
        for row in tables.read(listed, "the list of slides", "start the run again").rows():
            say(f"{row['slide_id']}: {row['status']}{': ' + row['reason'] if row['reason'] else ''}")
    return 0


def _no_run(root: Path) -> tuple[str, str]:
    """Return why a folder has no status, and what to name instead."""
    if not root.is_dir():
        return "there is no such folder", "name the out= folder of a run"
    trials = sorted(path.parent.name for path in root.glob("*/cases.json"))
    if trials:
        some = ", ".join(trials[:3]) + (f" and {len(trials) - 3} more" if len(trials) > 3 else "")
        return f"it holds no run itself but {len(trials)} in folders: {some}", "name the out= folder of a run"
    return "it holds no run", "name the out= folder of a run"


def _planned_told(root: Path, path: Path, n_looked: int) -> list[str]:
    """Say how far each stage of a planned run has come, and return what it still lacks."""
    from wsiflow.run import ledger, progress
    from wsiflow.run.executor import driver
    from wsiflow.run.plan import read_plan
    from wsiflow.run.stages.line import STAGES

    made = read_plan(path)
    balance = ledger.balance(root, made)
    say(f"plan {made.hash[:12]}: {len(made.slides)} slides, {made.n_groups} tasks")
    say(
        f"planned {balance.planned} = published {balance.published} + quarantined {balance.quarantined}"
        f" + not done {balance.failed}"
    )
    reached = progress.snapshot(root, made, driver.running_since(root))
    say(reached.as_text())
    found = {"ingest": (n_looked, len(made.slides) + len(made.rejected)), **reached.stages}
    found["evaluation"] = (int(_is_evaluated(root, made)), 1)
    for stage, (done, planned) in found.items():
        say(f"  {stage} {done:,} of {planned:,}")
    spare = {stage.name for stage in STAGES.values() if stage.serves_scores} if found["evaluation"][0] else set()
    needed = found.keys() - spare
    lacks = [f"{all_ - done:,} of {stage}" for stage, (done, all_) in found.items() if stage in needed and done < all_]
    if (root / "evaluation-PARTIAL/summary.json").is_file():
        lacks.append("slides: evaluation-PARTIAL/ has the scores of the others")
    return lacks


def _is_evaluated(root: Path, made: "Plan") -> bool:
    """Tell whether all that is planned has been scored and told."""
    import json

    folder = root / "evaluation"
    shown = [folder / "summary.json", folder / "matches.json", root / "report.html"]
    if made.rejected or not all(path.is_file() for path in shown):
        return False
    slides = json.loads((folder / "matches.json").read_text(encoding="utf-8"))["slides"]
    return {one["slide_id"] for one in slides} == {planned.slide_id for planned in made.slides}


def explain(arguments: argparse.Namespace) -> int:
    """Say why a task is done, or is not."""
    from wsiflow.run import explain

    for line in explain.explain(arguments.run, arguments.task):
        say(line)
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Compare every published file of a run with its receipt."""
    from wsiflow.run import shards
    from wsiflow.run.plan import latest_plan
    from wsiflow.system import publish

    names = publish.receipt_names(arguments.run)
    if not names:
        raise InputError("it holds no receipts", "name the out= folder of a run", path=arguments.run)
    made = latest_plan(arguments.run) if publish.generations(arguments.run, "plan.json") else None
    damaged = spared = 0
    for name in names:
        if made and not (arguments.run / name).exists() and shards.is_spare(arguments.run, made, name):
            spared += 1
            continue
        try:
            publish.check(arguments.run, publish.read_receipt(arguments.run, name) or {"path": name})
        except IntegrityError as error:
            damaged += 1
            report(error)
    say(f"{len(names) - damaged - spared} of {len(names)} published files are what their receipts say")
    if spared:
        say(f"{spared} files of pixels were deleted; nothing needs them, the scores are there")
    return IntegrityError.exit_code if damaged else 0


def task(arguments: argparse.Namespace) -> int:
    """Predict one array task of a plan."""
    from wsiflow.run.plan import read_plan
    from wsiflow.system import machine

    made = read_plan(arguments.plan)
    if not 0 <= arguments.index < made.n_groups:
        raise InputError(f"there is no task {arguments.index}, the plan has {made.n_groups}", "count from 0")
    machine.limit_threads(int(made.settings["predict"]["numeric_class"]["threads"]))
    from wsiflow.run.stages import pixels, work

    if pixels.fits_slides(pixels.stain_params(made)):  # done already where the run has come so far
        outcome = work.run_task(arguments.plan, "stain", made.task("group", arguments.index).slide)
        if outcome.receipt is None:
            say(outcome.error)
            return outcome.exit_code
    outcome = work.run_task(arguments.plan, "predict", arguments.index)
    say(outcome.error or f"published {(outcome.receipt or {})['path']}")
    return outcome.exit_code


def element(arguments: argparse.Namespace) -> int:
    """Do one element of an array job."""
    from wsiflow.run.executor import element

    return element.run(arguments.table)


def cancel(arguments: argparse.Namespace) -> int:
    """Cancel a run's jobs."""
    from wsiflow.run.executor import jobs

    for sentence in jobs.cancel(arguments.run):
        say(sentence)
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Compare the settings of a sweep, or of some runs."""
    from wsiflow.analysis.tradeoff import comparison

    options = comparison.Options(arguments.reference, arguments.bootstrap, arguments.seed)
    wanted = comparison.asked(arguments.names, arguments.uri, arguments.sweep, options)
    say(comparison.told((arguments.answer or comparison.answer)(wanted, arguments.out)))
    return 0


def doctor(_arguments: argparse.Namespace) -> int:
    """Say what the machine and the installation are."""
    from wsiflow.system import machine, provenance

    say(f"python {platform.python_version()} on {platform.platform()}")
    say(f"cores this process may use: {machine.allocated_cores()}")
    say(f"numeric class: {machine.numeric_class(1)}")
    say(f"free space here: {shutil.disk_usage('.').free / 1e9:.1f} GB")
    for name, found in provenance.versions().items():
        say(f"{name} {found}")
    return 0


def features(arguments: argparse.Namespace) -> int:
    """Write the features of some runs' slides."""
    from wsiflow.evaluation import slide_score
    from wsiflow.run.plan import latest_plan

    slides = {run: latest_plan(run).slides for run in arguments.runs}
    count = slide_score.write_features(slides, arguments.out, reference=arguments.reference)
    say(f"features of {count} slides: {arguments.out}")
    return 0


def train_forest(arguments: argparse.Namespace) -> int:
    """Train a forest on features."""
    from wsiflow.evaluation import slide_score
    from wsiflow.evaluation.forest import Choices

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


def score_by_forest(arguments: argparse.Namespace) -> int:
    """Score a run's slides with a forest."""
    from wsiflow.evaluation import slide_score
    from wsiflow.run.plan import latest_plan

    slides = latest_plan(arguments.run).slides
    scores = slide_score.write_scores(
        arguments.forest, arguments.run, slides, arguments.out, also_training=arguments.also_training
    )
    say(f"scores of {len(scores)} slides: {arguments.out}")
    return 0


def compare_maps(arguments: argparse.Namespace) -> int:
    """Compare the heatmaps of two runs."""
    from wsiflow.analysis.equivalence import maps
    from wsiflow.analysis.equivalence.report import table, write

    bound = arguments.bound
    if bound is not None and not 0 <= bound <= 1:
        raise InputError(f"the bound is {bound}", "give a difference of probabilities, 0 to 1")
    made = maps.compare(arguments.a, arguments.b, threshold=arguments.threshold, radius_um=arguments.radius_um)
    say(table(made))
    say(maps.sentence(made))
    if arguments.out is not None:
        write(made, arguments.out)
        say(f"written    {arguments.out / 'equivalence.md'}")
    if bound is None:
        return 0
    reasons = maps.verdict(made, bound)
    say(f"NOT EQUIVALENT within {bound:g}: {'; '.join(reasons)}" if reasons else f"equivalent within {bound:g}")
    return maps.NOT_EQUIVALENT if reasons else 0


def subsample(arguments: argparse.Namespace) -> int:
    """Score a run's heatmaps at coarser strides."""
    from wsiflow.analysis.subsample import write

    for folder in write(arguments.run, arguments.stride, arguments.out):
        say(f"scores     {folder / 'evaluation/summary.json'}")
    return 0


def export_imrmc(arguments: argparse.Namespace) -> int:
    """Write slide scores as iMRMC reads them."""
    from wsiflow.analysis.reviewers import imrmc

    n_cases = imrmc.export_imrmc(arguments.runs, arguments.names, arguments.out)
    say(f"{len(arguments.runs)} modalities, {n_cases} cases: {arguments.out}")
    return 0


def export_regulatory(arguments: argparse.Namespace) -> int:
    """Write everything about one run, for reviewers."""
    from wsiflow.analysis.reviewers import export

    cells = not arguments.no_cells
    asked = export.Asked(arguments.subgroups, arguments.table, arguments.threshold, cells)
    for line in export.export(arguments.run, arguments.out, asked):
        say(line)
    return 0
