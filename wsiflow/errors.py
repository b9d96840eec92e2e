"""The exceptions that wsiflow raises on purpose, and the exit code with which each one ends a command.

    WsiflowError                50  wsiflow itself has a defect
    +-- InputError              20  a slide, manifest, annotation, model or setting is wrong
    |   +-- SlideModified           a slide was modified while it was read
    +-- EnvironmentFault        30  the disk, a permission, the memory or the scheduler is at fault
    +-- IntegrityError          40  a published file differs from its receipt

A complete run ends with exit code 0. A run that left out slides, as its settings allow, ends with `PARTIAL`.

A message is one line. It names the slide, the stage and the file as far as they are known, then the cause, then the
remedy. Secrets are redacted in it, because messages are written to tables and sent to servers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from wsiflow.redaction import without_secrets

PARTIAL = 10


class Failure(NamedTuple):
    """What an error says, as plain values: they travel between processes and are kept in files.

    Attributes:
        exit_code: The exit code of the error's class.
        cause: What was wrong, with the actual value and the bound or form that was expected.
        remedy: What the user can do about it.
        slide: Id of the slide that is concerned, if any.
        stage: Stage of the run, for example ``tissue`` or ``predict``, if any.
        path: File or folder that is concerned, if any.
    """

    exit_code: int
    cause: str
    remedy: str
    slide: str = ""
    stage: str = ""
    path: str = ""

    def __str__(self) -> str:
        """Join the parts into one line."""
        where = ", ".join(filter(None, (f"slide {self.slide}" if self.slide else "", self.stage, self.path)))
        text = f"{self.cause}; {self.remedy}"
        return without_secrets(" ".join((f"{where}: {text}" if where else text).split()))

    def about(self, *, slide: str = "", stage: str = "", path: object = "") -> "Failure":
        """Return a copy of the failure in which slide, stage and path are filled in where they were empty."""
        return self._replace(slide=self.slide or slide, stage=self.stage or stage, path=self.path or str(path))

    def error(self) -> "WsiflowError":
        """Return the error that says this."""
        kind = next((kind for kind in _KINDS if kind.exit_code == self.exit_code), WsiflowError)
        return kind(self.cause, self.remedy, slide=self.slide, stage=self.stage, path=self.path)


class WsiflowError(Exception):
    """A failure that has a cause and a remedy, and whose message is one line."""

    exit_code = 50

    def __init__(self, cause: str, remedy: str, *, slide: str = "", stage: str = "", path: object = "") -> None:
        """Keep what is known about the failure, see `Failure`."""
        super().__init__(cause, remedy, slide, stage, path)
        self.failure = Failure(self.exit_code, cause, remedy, slide, stage, str(path))

    @property
    def cause(self) -> str:
        """What was wrong."""
        return self.failure.cause

    @property
    def remedy(self) -> str:
        """What the user can do about it."""
        return self.failure.remedy

    def __str__(self) -> str:
        """Return the failure in one line."""
        return str(self.failure)

    def __reduce__(self) -> tuple[Callable[..., "WsiflowError"], tuple[Any, ...]]:
        """Pickle the keyword arguments too, so that an error of a worker process reaches its parent whole."""
        return _rebuild, (type(self), self.failure)

    def about(self, *, slide: str = "", stage: str = "", path: object = "") -> "WsiflowError":
        """Return a copy of the error in which slide, stage and path are filled in where they were empty."""
        return _rebuild(type(self), self.failure.about(slide=slide, stage=stage, path=path))


def _rebuild(kind: type[WsiflowError], failure: Failure) -> WsiflowError:
    _, cause, remedy, slide, stage, path = failure
    return kind(cause, remedy, slide=slide, stage=stage, path=path)


class InputError(WsiflowError):
    """Raised when a slide, manifest, annotation, model card or setting cannot be used as it is."""

    exit_code = 20


class SlideModified(InputError):
    """Raised when a slide was modified while it was read, so that the pixels may mix two versions of the file."""


class EnvironmentFault(WsiflowError):
    """Raised when the machine, file system or scheduler refused something that may work later or elsewhere."""

    exit_code = 30


class IntegrityError(WsiflowError):
    """Raised when a file differs from its receipt, its recorded hash or the plan."""

    exit_code = 40


# A slide that was written while it was read is an `InputError` to whoever is told of it afterwards.
_KINDS = (InputError, EnvironmentFault, IntegrityError)
