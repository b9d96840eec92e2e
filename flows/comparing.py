"""Show comparisons in Prefect, and compare the runs of a sweep when it ends.

Where `PREFECT_API_URL` names a server that answers, a comparison becomes a flow run with its table and its text as
artifacts. Elsewhere the comparison runs without Prefect, and no server is started for it.
"""

import re
from collections.abc import Collection
from functools import partial
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.settings import PREFECT_API_URL

from wsiflow.analysis.tradeoff import comparison, report, rows
from wsiflow.analysis.tradeoff.comparison import ComparisonResult
from wsiflow.errors import WsiflowError
from wsiflow.run.tracking import TrackingParams

from . import artifacts, reported, terminal
from .server import answers

_PICTURE = re.compile(r"^!\[(.*)\]\((.*)\)$", re.MULTILINE)


def run_comparison(request: comparison.Request, out: Path) -> ComparisonResult:
    """Run `wsiflow.analysis.tradeoff.comparison.run_comparison`, and show the result in Prefect."""
    result = comparison.run_comparison(request, out)
    _show_in_prefect(result)
    return result


def compare_sweep(out: Path, params: TrackingParams, options: rows.Options, failed: Collection[str] = ()) -> None:
    """Compare the runs of a sweep's folder, and print the result or why they were not compared.

    The sweep is complete without its comparison, so a fault is printed and not raised. Trials that failed are left out,
    whatever an earlier start left in their folders.
    """
    try:
        result = comparison.compare_sweep_folder(out, params, options, failed)
    except WsiflowError as error:
        lines = _not_compared(out, params, str(error), failed)
        terminal.say("\n".join([f"the sweep's runs were not compared: {error}", *lines]))
        return
    if result is None:
        terminal.say("\n".join(_not_compared(out, params, "fewer than two of them have scores", failed)))
        return
    terminal.say(comparison.summary_text(result))
    _show_in_prefect(result)


def _not_compared(out: Path, params: TrackingParams, reason: str, failed: Collection[str]) -> list[str]:
    """Describe in MLflow a sweep whose runs are not compared, and return the lines that say where it is seen."""
    logged = comparison.describe_sweep(out, params, reason, failed)
    return comparison.mlflow_lines(params, logged)


def _show_in_prefect(result: ComparisonResult) -> None:
    """Show a comparison as a flow run, where a Prefect server answers."""
    try:
        server_answers = answers(PREFECT_API_URL.value() or "")
    except WsiflowError as error:
        terminal.say(f"the comparison is not shown in Prefect: {error}")
        return
    if server_answers:
        run_name = f"compare {result.tradeoff.name}"
        flow(name="wsiflow compare", flow_run_name=run_name, persist_result=False)(create_artifacts)(result)


def create_artifacts(result: ComparisonResult) -> None:
    """Create the text of a comparison, with its figures, and its table as artifacts of the present flow run."""
    name = result.tradeoff.name
    reported.add_tags(sweep=name)
    key = partial(artifacts.key_of, name, result.out)
    rows = report.main_table(result.tradeoff)
    create_table_artifact(rows, key=key("comparison-table"), description=f"Comparison of {name}")
    text = _PICTURE.sub(
        lambda match: artifacts.picture(match[1], result.files[match[2]], "png"), result.files["compare.md"].decode()
    )
    links = f"Report: `{(result.out / 'report.html').resolve()}`\n"
    create_markdown_artifact(f"{text}\n{links}", key=key("comparison"), description=f"Comparison of {name}")
