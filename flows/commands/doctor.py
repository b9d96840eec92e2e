"""``wsiflow doctor``: what the machine and the installation are, and what a run would miss here or on a cluster."""

import platform
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from wsiflow.errors import EnvironmentFault, WsiflowError
from wsiflow.run.executor import probe
from wsiflow.run.executor.params import ExecutorParams
from wsiflow.run.executor.protocol import Slice
from wsiflow.system import checks, machine, provenance, publish
from wsiflow.system.checks import Finding

from ..terminal import say

_STAGE = "probe"


def add_options(parser: ArgumentParser) -> None:
    """Add the trial of an executor."""
    parser.description = "What the machine and the installation are, with a remedy for what a run would miss."
    parser.add_argument("--cluster", action="store_true", help="have a worker of the executor do a task, too")
    parser.add_argument("overrides", nargs="*", help="with --cluster, as for wsiflow run: executor=slurm_array ...")


def main(arguments: Namespace) -> int:
    """Print the findings, then the machine and the versions of what is installed, as a bug report needs them."""
    missing = False
    for finding in _findings(arguments):
        missing |= bool(finding.remedy)
        say(f"{'!' if finding.remedy else ' '} {finding.subject:10} {finding.text}" + _then(finding.remedy))
    say(f"  python     {platform.python_version()} on {platform.platform()}")
    say(f"  class      {machine.numeric_class(1)}")
    say("  versions   " + ", ".join(f"{name} {version}" for name, version in provenance.versions().items()))
    return EnvironmentFault.exit_code if missing else 0


def _then(remedy: str) -> str:
    return f"; {remedy}" if remedy else ""


def _findings(arguments: Namespace) -> Iterator[Finding]:
    yield from checks.findings(Path())
    if arguments.cluster:
        try:
            yield _try_worker(arguments.overrides)
        except WsiflowError as error:
            yield checks.of_failure("cluster", error.failure)


def _try_worker(overrides: list[str]) -> Finding:
    """Have one worker of an executor do a task in a folder of its own here, and return where it ran."""
    from ..cluster import workers
    from ..compose import compose_config
    from ..run import quieten

    quieten()
    with tempfile.TemporaryDirectory(dir=".", prefix="wsiflow-doctor-", ignore_cleanup_errors=True) as folder:
        root = Path(folder).resolve()
        params = _brief(compose_config([*overrides, f"out={root}"]).executor)
        (root / publish.ATTEMPTS).mkdir()
        source = root / "source"
        source.write_text(root.name, encoding="utf-8")
        with workers(params, root) as pool:
            outcomes = list(pool.run(probe.work, source, _STAGE, [Slice(0, 1)]))
    last = outcomes[-1]
    if last.failure is not None:
        return checks.of_failure("cluster", last.failure)
    facts, own = last.receipt or {}, provenance.versions()["wsiflow"]
    text = f"a task of executor {params.kind} ran on {facts['host']}, with {facts['cores']} cores ({facts['isa']})"
    remedy = "" if facts["wsiflow"] == own else f"install wsiflow {own} there, it has {facts['wsiflow']}"
    return Finding("cluster", text, remedy)


def _brief(params: ExecutorParams) -> ExecutorParams:
    """Return the settings of an executor with one worker, which does not wait for more work."""
    array = params.array and params.array.model_copy(update={"idle_s": 0.0})
    return params.model_copy(update={"workers": 1, "array": array})
