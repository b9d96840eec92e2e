"""The protocol of executors: slices and work go in, outcomes come out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from wsiflow.errors import EnvironmentFault, Failure


class Slice(NamedTuple):
    """The tasks ``lo`` to ``hi - 1`` of a stage, which one worker does one after another.

    Attributes:
        lo: Index of its first task.
        hi: Index behind its last task.
        expected_s: Core-seconds that they are expected to take; 0 where nobody knows.
    """

    lo: int
    hi: int
    expected_s: float = 0.0

    @property
    def tasks(self) -> range:
        """The indices of its tasks."""
        return range(self.lo, self.hi)


class Outcome(NamedTuple):
    """The outcome of one attempt at a task.

    Attributes:
        task: Index of the task in its stage.
        receipt: The receipt of the published file; None where the task failed.
        executed: Whether the task was executed; False where its file was published already.
        failure: Why the task failed; None where it did not.
        usage: The resources that the attempt used, and where it ran, see `wsiflow.system.usage`; None where unknown.
        retried: Whether the attempt was lost and another one follows; only the trace uses such outcomes.
    """

    task: int
    receipt: dict[str, Any] | None
    executed: bool
    failure: Failure | None = None
    usage: dict[str, Any] | None = None
    retried: bool = False

    @property
    def exit_code(self) -> int:
        """The exit code of the failure; 0 where there is none."""
        return self.failure.exit_code if self.failure else 0

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "Outcome":
        """Return the outcome whose fields were written as JSON."""
        failure = values["failure"]
        return cls(**{**values, "failure": None if failure is None else Failure(*failure)})

    def with_usage(self, **known: Any) -> "Outcome":
        """Return the outcome with more facts of its attempt."""
        return self._replace(usage={**(self.usage or {}), **known})


class Site(NamedTuple):
    """The arguments of an executor besides its settings.

    Attributes:
        cores: Number of cores that this process may use.
        root: The run's folder.
        client: The client of the Dask cluster, for kinds of executors that have one.
        needs: Files and folders outside of the run's folder that every node has to see.
        numeric_class: The class of machines that the run is planned for; None where there is no plan yet.
    """

    cores: int
    root: Path
    client: Any
    needs: Sequence[Path] = ()
    numeric_class: Mapping[str, str] | None = None


Work = Callable[[Path, str, int, int], Iterator[Outcome]]
"""``work(source, stage, lo, hi)`` does the tasks of a slice and yields the outcome of each."""


class Executor(Protocol):
    """A place where the tasks of a run are executed."""

    def run(self, work: Work, source: Path, stage: str, slices: Sequence[Slice]) -> Iterator[Outcome]:
        """Start the slices in the given order, and yield outcomes in any order.

        Args:
            work: Function that a worker calls with each slice.
            source: The file that lists the tasks, see `wsiflow.run.stages.work`.
            stage: Name of the stage.
            slices: Slices that do not overlap.

        Yields:
            For each task one outcome that is not ``retried``, and any number that are.

        Raises:
            EnvironmentFault: The executor was closed or stopped meanwhile, see `closed`.
        """
        ...

    def stop(self) -> str | None:
        """End running tasks and start no more; any thread may call this.

        Returns:
            What was ended, in words for the user; None where there is nothing to say.
        """
        ...


def closed() -> EnvironmentFault:
    """Return the error that every waiting `Executor.run` raises when its executor is closed."""
    return EnvironmentFault("the run ended before this was done", "run again: what is done stays done")
