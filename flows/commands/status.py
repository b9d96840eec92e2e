"""``wsiflow status``: what a run has done, whether it is complete, and who runs it, from the disk alone."""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from wsiflow.errors import InputError
from wsiflow.run import first_pass, ledger, progress
from wsiflow.run.executor import driver, waiting
from wsiflow.run.plan import Plan, read_plan
from wsiflow.run.stages import ingest
from wsiflow.run.stages.line import STAGES, ingested
from wsiflow.system import publish, tables

from ..terminal import say


def add_options(parser: ArgumentParser) -> None:
    """Add the run's folder."""
    parser.add_argument("run", type=Path)


def main(arguments: Namespace) -> int:
    """Print how far the run is, and how every slide ended."""
    root = arguments.run
    cases_path = ingest.newest_cases(root)
    if cases_path is None:
        raise InputError(*_no_run(root), path=root)
    cases = json.loads(cases_path.read_text(encoding="utf-8"))["cases"]
    plans = publish.generations(root, "plan.json")
    n_ingested = ingested(root, (case["slide_id"] for case in cases))
    if not plans:
        say("there is no plan yet")
        say(f"ingest {n_ingested} of {len(cases)}")
    _print_first_passes(root)
    missing = _print_stages(root, plans[-1], n_ingested) if plans else ["a plan"]
    say(f"not complete: it lacks {', '.join(missing)}" if missing else "complete")
    for line in waiting.describe(root):
        say(line)
    for sentence in driver.describe_drivers(root):
        say(sentence)
    slide_list = root / "process_list.csv"
    if slide_list.exists():
        for row in tables.read(slide_list, "the list of slides", "start the run again").rows():
            say(f"{row['slide_id']}: {row['status']}{': ' + row['reason'] if row['reason'] else ''}")
    return 0


def _print_first_passes(root: Path) -> None:
    """Print how far the first passes of a cascade are."""
    for folder in (root / first_pass.DEVELOPMENT, first_pass.folder_of(root)):
        if plans := publish.generations(folder, "plan.json"):
            say(progress.snapshot(folder, read_plan(plans[-1]), driver.running_since(root)).as_text())


def _no_run(root: Path) -> tuple[str, str]:
    """Return why a folder has no status, and which folder to name instead."""
    if not root.is_dir():
        return "there is no such folder", "name the out= folder of a run"
    trials = sorted(path.parent.name for path in root.glob("*/cases.json"))
    if trials:
        some = ", ".join(trials[:3]) + (f" and {len(trials) - 3} more" if len(trials) > 3 else "")
        return f"it holds no run itself but {len(trials)} in folders: {some}", "name the out= folder of a run"
    return "it holds no run", "name the out= folder of a run"


def _print_stages(root: Path, path: Path, n_ingested: int) -> list[str]:
    """Print how far each stage of a planned run is, and return what is missing."""
    plan = read_plan(path)
    balance = ledger.balance(root, plan)
    say(f"plan {plan.hash[:12]}: {len(plan.slides)} slides, {plan.n_groups} tasks")
    say(
        f"planned {balance.planned} = published {balance.published} + quarantined {balance.quarantined}"
        f" + not done {balance.failed}"
    )
    snapshot = progress.snapshot(root, plan, driver.running_since(root))
    say(snapshot.as_text())
    counts = {"ingest": (n_ingested, len(plan.slides) + len(plan.rejected)), **snapshot.stages}
    counts["evaluation"] = (int(_is_evaluated(root, plan)), 1)
    for stage, (done, planned) in counts.items():
        say(f"  {stage} {done:,} of {planned:,}")
    spare = {stage.name for stage in STAGES.values() if stage.serves_scores} if counts["evaluation"][0] else set()
    needed = {stage: count for stage, count in counts.items() if stage not in spare}
    missing = [f"{planned - done:,} of {stage}" for stage, (done, planned) in needed.items() if done < planned]
    if (root / "evaluation-PARTIAL/summary.json").is_file():
        missing.append("slides: evaluation-PARTIAL/ has the scores of the others")
    return missing


def _is_evaluated(root: Path, plan: Plan) -> bool:
    """Tell whether all that is planned has been scored and reported."""
    folder = root / "evaluation"
    reports = [folder / "summary.json", folder / "matches.json", root / "report.html"]
    if plan.rejected or not all(path.is_file() for path in reports):
        return False
    slides = json.loads((folder / "matches.json").read_text(encoding="utf-8"))["slides"]
    return {one["slide_id"] for one in slides} == {planned.slide_id for planned in plan.slides}
