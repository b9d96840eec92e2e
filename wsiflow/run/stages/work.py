"""Do the tasks of stages: this is what the workers of every executor call.

A task reads files, computes, publishes one file and returns its receipt. The function of every stage has the form
``(source, index) -> (receipt, executed)``. ``source`` is the file that lists the tasks: ``cases.json`` for ``choose``
and ``ingest``, and the plan for every later stage. The folder of that file is the run's folder. A task whose file is
published already does nothing.

The stages, with what one task works on: ``choose`` (the run), ``ingest`` (a case), ``measure`` (the run), ``calibrate``
(the run, for int8), ``threshold`` (the development slides of a cascade), ``stain`` (a slide), ``extract`` (a part of a
slide), ``index`` (a slide), ``predict`` (a group), ``certify``, ``stitch`` and ``detect`` (a slide), ``advise`` (the
run, where a certificate exceeds the tolerance).
"""

import traceback
from collections.abc import Iterator
from pathlib import Path

from wsiflow.errors import EnvironmentFault, SlideModified, WsiflowError
from wsiflow.run.executor.protocol import Outcome
from wsiflow.run.stages import advice, calibrate, ingest, measure, precisions, threshold
from wsiflow.run.stages.line import STAGES
from wsiflow.run.stages.stage import Work
from wsiflow.system import faults
from wsiflow.system.usage import Meter


def run_slice(source: Path, stage: str, lo: int, hi: int) -> Iterator[Outcome]:
    """Do the tasks ``lo`` to ``hi - 1`` of a stage one after another, and yield the outcome of each."""
    for index in range(lo, hi):
        meter = Meter()
        outcome = run_task(source, stage, index)
        yield outcome.with_usage(**meter.usage(executed=outcome.executed))


def run_task(source: Path, stage: str, index: int) -> Outcome:
    """Do one task of a stage and return its outcome; every exception becomes a failure in the outcome.

    Args:
        source: The ``cases.json`` or the plan of the run.
        stage: Name of the stage, as in the trace.
        index: Index of the task in its stage: of a case, slide, part or group.
    """
    try:
        try:
            receipt, executed = _work(stage)(source, index)
        except SlideModified:
            # A new link or owner is enough for this error, and a copy may have ended meanwhile: one more attempt.
            receipt, executed = _work(stage)(source, index)
    except Exception as error:  # noqa: BLE001 - the boundary: a defect in one task must not lose the others
        usage = {"exit_class": "memory"} if faults.is_of_memory(error) else None  # where it can be given more, it is
        return Outcome(index, None, executed=True, failure=_known(error).failure.about(stage=stage), usage=usage)
    return Outcome(index, receipt, executed=executed)


def _known(error: Exception) -> WsiflowError:
    """Return the error that ended a task as a `WsiflowError`."""
    if isinstance(error, WsiflowError):
        return error
    if isinstance(error, OSError):
        return faults.fault(error)
    if faults.is_of_memory(error):
        return EnvironmentFault(f"out of memory ({error})", "free memory, or use fewer workers")
    where = traceback.extract_tb(error.__traceback__)[-1]
    cause = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    return WsiflowError(cause, "report this")


def _work(stage: str) -> Work:
    return _APART[stage] if stage in _APART else STAGES[stage].work


# Stages that a run does before the line, or once for all slides.
_APART: dict[str, Work] = {
    "choose": precisions.choose,
    "ingest": ingest.ingest,
    "measure": measure.measure,
    "calibrate": calibrate.calibrate,
    "advise": advice.advise,
    "threshold": threshold.choose,
}
