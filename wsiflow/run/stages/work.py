"""What one task does, stage by stage: read, compute, publish one file, return its receipt.

Every stage has the same form, ``(source, index) -> (receipt, executed)``, with ``source`` the file that says what there
is to do: ``cases.json`` for ``choose`` and ``ingest``, the plan for every later stage. The run's folder is where that
file lies. A stage that finds its file published does nothing.

Stages: ``choose`` (once), ``ingest`` (a case), ``measure`` (once), ``calibrate`` (once, for int8), ``stain`` (a slide),
``extract`` (a part of a slide), ``index`` (a slide), ``predict`` (a group), ``certify``, ``stitch`` and ``detect`` (a
slide), ``advise`` (once, where a certificate is beyond the tolerance).
"""

import traceback
from collections.abc import Iterator
from pathlib import Path

from wsiflow.errors import EnvironmentFault, SlideModified, WsiflowError
from wsiflow.run.executor.protocol import Outcome
from wsiflow.run.stages import calibrate, certify, choose, ingest, measure
from wsiflow.run.stages.line import STAGES
from wsiflow.run.stages.stage import Work
from wsiflow.system import faults
from wsiflow.system.usage import Meter


def run_slice(source: Path, stage: str, lo: int, hi: int) -> Iterator[Outcome]:
    """Do the tasks ``lo`` to ``hi - 1`` of a stage one after another: what every executor's workers call."""
    for index in range(lo, hi):
        meter = Meter()
        outcome = run_task(source, stage, index)
        yield outcome.with_usage(**meter.usage(executed=outcome.executed))


def run_task(source: Path, stage: str, index: int) -> Outcome:
    """Do one task of a stage and say how it ended; nothing but a dying process gets past this function.

    Args:
        source: ``cases.json`` or a plan.
        stage: Its name, as in the trace.
        index: The task's place in its stage: a case, slide, part or group.
    """
    try:
        try:
            receipt, executed = _work(stage)(source, index)
        except (
            SlideModified
        ):  # a new link or owner would do, and a copy may have ended: what was read is read again, once
            receipt, executed = _work(stage)(source, index)
    except Exception as error:  # noqa: BLE001 - the boundary: a defect in one task must not lose the others
        return Outcome(index, None, executed=True, failure=_known(error).failure.about(stage=stage))
    return Outcome(index, receipt, executed=executed)


def _known(error: Exception) -> WsiflowError:
    """Return what ended a task as one of the errors that wsiflow raises."""
    if isinstance(error, WsiflowError):
        return error
    if isinstance(error, OSError):
        return faults.fault(error)
    if isinstance(error, MemoryError):
        return EnvironmentFault(f"out of memory ({error})", "free memory, or use fewer workers")
    where = traceback.extract_tb(error.__traceback__)[-1]
    cause = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    return WsiflowError(cause, "report this")


def _work(stage: str) -> Work:
    return _APART[stage] if stage in _APART else STAGES[stage].work


# What a run does before the line and beside it.
_APART: dict[str, Work] = {
    "choose": choose.choose,
    "ingest": ingest.ingest,
    "measure": measure.measure,
    "calibrate": calibrate.calibrate,
    "advise": certify.advise,
}
