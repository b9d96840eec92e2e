"""What every executor takes and returns."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from wsiflow.errors import EnvironmentFault, Failure


class Slice(NamedTuple):
    """A half-open range of a stage's tasks, done by one worker one after another."""

    lo: int
    hi: int


class Outcome(NamedTuple):
    """How one task ended.

    Attributes:
        task: The task's place in its stage.
        receipt: The receipt of what it published, None where it failed.
        executed: False where it was done already.
        failure: Why it published nothing; None where it did.
        usage: What the attempt used and where it ran, see `wsiflow.system.usage`; None where it is not known.
        retried: This attempt was lost and another one follows: of interest to the trace alone.
    """

    task: int
    receipt: dict[str, Any] | None
    executed: bool
    failure: Failure | None = None
    usage: dict[str, Any] | None = None
    retried: bool = False

    @property
    def exit_code(self) -> int:
        """The exit code of the failure's class, 0 where there is none."""
        return self.failure.exit_code if self.failure else 0

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "Outcome":
        """Return the outcome that was written as JSON of its fields."""
        failure = values["failure"]
        return cls(**{**values, "failure": None if failure is None else Failure(*failure)})

    def with_usage(self, **known: Any) -> "Outcome":
        """Return the outcome with more that is known of its attempt."""
        return self._replace(usage={**(self.usage or {}), **known})


class Site(NamedTuple):
    """What an executor is given besides its settings.

    Attributes:
        cores: Cores this process may use.
        root: The run's folder.
        client: Of the Dask cluster, for kinds of executors that have one.
    """

    cores: int
    root: Path
    client: Any


Work = Callable[[Path, str, int, int], Iterator[Outcome]]
"""``work(source, stage, lo, hi)`` does the tasks of a slice and yields how each ended."""


class Executor(Protocol):
    """Runs tasks of a plan."""

    def run(self, work: Work, source: Path, stage: str, slices: Sequence[Slice]) -> Iterator[Outcome]:
        """Run every slice, the first ones first, and yield the outcomes as they come.

        Args:
            work: What a worker calls with each slice.
            source: The file that says what there is to do, see `wsiflow.run.stages.work`.
            stage: The stage.
            slices: Ranges that do not overlap.

        Yields:
            For each task one outcome that is not ``retried``, and any number that are.

        Raises:
            EnvironmentFault: The executor was closed or stopped meanwhile, see `closed`.
        """
        ...

    def stop(self) -> str | None:
        """End what is under way and take nothing more, from any thread; return what is to be told of it."""
        ...


def closed() -> EnvironmentFault:
    """Return what ends every `Executor.run` that is under way when its executor ends: nobody waits for ever."""
    return EnvironmentFault("the run ended before this was done", "run again: what is done stays done")
