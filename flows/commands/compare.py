"""``wsiflow compare``: what settings score and cost, with intervals, and which are worth their cost."""

import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path

from wsiflow.analysis.tradeoff import comparison, rows
from wsiflow.analysis.tradeoff.comparison import ComparisonResult, Request
from wsiflow.errors import InputError
from wsiflow.run.tracking import default_uri

from ..options import natural
from ..terminal import say


def add_options(parser: ArgumentParser) -> None:
    """Add the runs to compare, and the options of the comparison."""
    parser.add_argument("names", nargs="+", metavar="EXPERIMENT | RUN", help="an MLflow experiment, or folders of runs")
    parser.add_argument(
        "--sweep", help="the sweep of the experiment to compare, by name or folder; needed where it has several"
    )
    parser.add_argument(
        "--tag",
        type=_tag,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="compare the runs of the experiment that have this tag in MLflow, of whatever sweep; several: all of them",
    )
    parser.add_argument(
        "--uri",
        default=default_uri(),
        help="MLflow store of the experiment (MLFLOW_TRACKING_URI, else sqlite:///runs/mlflow.db)",
    )
    parser.add_argument(
        "--reference", default="", help="setting the others are compared with (the finest stride in fp32)"
    )
    parser.add_argument(
        "--margin",
        type=_share,
        help="largest loss that is accepted, such as 0.02: says of each setting whether a larger one is excluded",
    )
    parser.add_argument(
        "--metric",
        default="",
        help="metric of the margin and the Pareto set: froc.score, froc.strict_score or roc.auc (FROC, else AUC)",
    )
    parser.add_argument(
        "--family",
        type=_family,
        action="append",
        default=[],
        metavar="NAME=KEY[,KEY]",
        help="settings that differ from the reference in these parameters alone are corrected for by themselves",
    )
    parser.add_argument("--power", action="store_true", help="say how many slides a larger study needs")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="folder to write (comparison)")
    parser.add_argument("--bootstrap", type=natural, default=2000, help="resamples of the intervals (2000)")
    parser.add_argument("--seed", type=natural, default=0)


def main(arguments: Namespace) -> int:
    """Compare the settings of a sweep, or of some runs."""
    options = rows.Options(
        reference=arguments.reference,
        resamples=arguments.bootstrap,
        seed=arguments.seed,
        margin=arguments.margin,
        metric=arguments.metric,
        families=_families(arguments.family),
        power=arguments.power,
    )
    request = comparison.parse_request(arguments.names, arguments.uri, arguments.sweep, options, dict(arguments.tag))
    say(comparison.summary_text(_compare(request, arguments.out)))
    return 0


def _tag(text: str) -> tuple[str, str]:
    """Return name and value of a tag."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    return name, value


def _family(text: str) -> tuple[str, tuple[str, ...]]:
    """Return name and parameters of a family."""
    name, equals, keys = text.partition("=")
    if not (name and equals and all(keys.split(","))):
        raise ArgumentTypeError(f"{text!r} is not of the form NAME=KEY[,KEY]")
    return name, tuple(keys.split(","))


def _families(given: Sequence[tuple[str, tuple[str, ...]]]) -> dict[str, tuple[str, ...]]:
    """Return the parameters of each family by its name.

    Raises:
        InputError: Two families have one name, so that one would be left out.
    """
    families: dict[str, tuple[str, ...]] = {}
    for name, keys in given:
        if name in families:
            remedy = f"give --family {name}={','.join((*families[name], *keys))}, or two names"
            raise InputError(f"there are two families {name!r}", remedy, stage="comparison")
        families[name] = keys
    return families


def _share(text: str) -> float:
    """Return a margin: a number above 0 and below 1."""
    try:
        value = float(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not a number") from error
    if not 0 < value < 1:
        raise ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _compare(request: Request, out: Path) -> ComparisonResult:
    """Run the comparison, and show its result in Prefect where a server is set."""
    if not os.environ.get("PREFECT_API_URL"):
        return comparison.run_comparison(request, out)
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")  # this command prints errors, once
    from ..comparing import run_comparison  # importing Prefect takes seconds

    return run_comparison(request, out)
