"""Comparisons as Prefect shows them, and the one at the end of a sweep.

With a Prefect server that is set and answers, a comparison is a flow run with its table and its text as artifacts.
Without one the same is done directly: nothing is started for it.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from wsiflow import cli, compare, tradeoff_report
from wsiflow.compare import Answer
from wsiflow.errors import WsiflowError
from wsiflow.tracking import TrackingParams

from .server import answers

_PICTURE = re.compile(r"^!\[.*\]\((.*)\)$", re.MULTILINE)


def answer(wanted: compare.Asked, out: Path) -> Answer:
    """Compare what a user asks for, see `wsiflow.compare.answer`."""
    found = _told_to_prefect("compare", lambda: compare.answer(wanted, out))
    assert found is not None
    return found


def end_of_sweep(out: Path, params: TrackingParams) -> None:
    """Compare the runs of a sweep's folder and say what was found, or why they were not compared.

    The sweep is complete without: what is wrong is told and raises nothing.
    """
    try:
        found = _told_to_prefect(f"compare {params.sweep}", lambda: compare.sweep_folder(out, params))
    except WsiflowError as error:
        cli.report(error)
        return
    if found is not None:
        cli.say(compare.told(found))


def _told_to_prefect(name: str, function: Callable[[], Answer | None]) -> Answer | None:
    """Call a function, as a flow run of this name where a server takes it."""
    url = os.environ.get("PREFECT_API_URL", "")
    if not answers(url):
        return function()

    @flow(name="wsiflow compare", flow_run_name=name, persist_result=False)
    def comparison() -> Answer | None:
        found = function()
        if found is not None:
            show(found)
        return found

    return comparison()


def show(made: Answer) -> None:
    """Make the artifacts of a comparison, on the page of the flow run that this is called in."""
    key = "wsiflow-compare-" + re.sub(r"[^a-z0-9]+", "-", made.found.name.lower()).strip("-")
    table = tradeoff_report.columns(made.found)
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    create_table_artifact(rows, key=f"{key}-table", description=f"Comparison of {made.found.name}")
    # Prefect shows pictures from addresses alone, and these are files.
    text = _PICTURE.sub(lambda named: f"Figure: `{(made.out / named[1]).resolve()}`", made.files["compare.md"].decode())
    create_markdown_artifact(f"{text}\nReport: `{(made.out / 'report.html').resolve()}`\n", key=key)
