"""Comparisons as Prefect shows them, and the one at the end of a sweep.

With a Prefect server that is set and answers, a comparison is a flow run with its table and its text as artifacts.
Without one the same is done directly: nothing is started for it.
"""

import re
from collections.abc import Collection
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.settings import PREFECT_API_URL

from wsiflow.analysis.tradeoff import comparison, report
from wsiflow.analysis.tradeoff.comparison import Answer
from wsiflow.errors import WsiflowError
from wsiflow.run.tracking import TrackingParams

from . import terminal
from .server import answers

_PICTURE = re.compile(r"^!\[.*\]\((.*)\)$", re.MULTILINE)


def answer(wanted: comparison.Asked, out: Path) -> Answer:
    """Compare what a user asks for, see `wsiflow.analysis.tradeoff.comparison.answer`."""
    made = comparison.answer(wanted, out)
    _tell_prefect(made)
    return made


def end_of_sweep(out: Path, params: TrackingParams, options: comparison.Options, failed: Collection[str] = ()) -> None:
    """Compare the runs of a sweep's folder and say what was found, or why they were not compared.

    The sweep is complete without: what is wrong is told and raises nothing. What failed now is left out, whatever an
    earlier start left in its folder.
    """
    try:
        made = comparison.sweep_folder(out, params, options, failed)
    except WsiflowError as error:
        terminal.say(f"not compared: {error}")
        return
    if made is not None:
        terminal.say(comparison.told(made))
        _tell_prefect(made)


def _tell_prefect(made: Answer) -> None:
    """Show a comparison as a flow run, where a server takes it."""
    try:
        is_there = answers(PREFECT_API_URL.value() or "")
    except WsiflowError as error:
        terminal.say(f"not shown in Prefect: {error}")
        return
    if is_there:
        flow(name="wsiflow compare", flow_run_name=f"compare {made.found.name}", persist_result=False)(show)(made)


def show(made: Answer) -> None:
    """Make the artifacts of a comparison, on the page of the flow run that this is called in."""
    key = "wsiflow-compare-" + re.sub(r"[^a-z0-9]+", "-", made.found.name.lower()).strip("-")
    table = report.columns(made.found)
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    create_table_artifact(rows, key=f"{key}-table", description=f"Comparison of {made.found.name}")
    # Prefect shows pictures from addresses alone, and these are files.
    text = _PICTURE.sub(lambda named: f"Figure: `{(made.out / named[1]).resolve()}`", made.files["compare.md"].decode())
    create_markdown_artifact(f"{text}\nReport: `{(made.out / 'report.html').resolve()}`\n", key=key)
