"""Every error wsiflow raises on purpose, and the exit code each one ends a command with.

    WsiflowError                50  a defect of wsiflow itself
    +-- InputError              20  a slide, manifest, annotation, model or setting is wrong
    |   +-- Rewritten               a slide was written while it was read
    +-- EnvironmentFault        30  disk, permission, memory, scheduler
    +-- IntegrityError          40  a published file differs from what its receipt says

A complete run ends with 0, one that scored without some slides, as the user allowed, with `PARTIAL`.

A message is one line: slide, stage and file as far as they are known, the cause, and what to do about it; never with a
secret in it, since messages are kept in tables and sent to servers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from wsiflow.redaction import without_secrets

PARTIAL = 10


class Failure(NamedTuple):
    """What an error says, as plain values: they travel between processes and are kept in files.

    Attributes:
        exit_code: The exit code of the error's class.
        cause: What was wrong, with the value found and the bound or form expected.
        remedy: What the user can do about it.
        slide: The slide id, where one is concerned.
        stage: The step of the line, for example ``tissue`` or ``predict``.
        path: The file or folder concerned.
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
        """Return the same failure with slide, stage and path filled in where they were not known."""
        return self._replace(slide=self.slide or slide, stage=self.stage or stage, path=self.path or str(path))

    def error(self) -> "WsiflowError":
        """Return the error that says this."""
        kind = next((kind for kind in _KINDS if kind.exit_code == self.exit_code), WsiflowError)
        return kind(self.cause, self.remedy, slide=self.slide, stage=self.stage, path=self.path)


class WsiflowError(Exception):
    """A failure with a cause and a remedy, told in one line."""

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
        """Pickle with the keyword arguments, so that the error survives a process boundary."""
        return _rebuild, (type(self), self.failure)

    def about(self, *, slide: str = "", stage: str = "", path: object = "") -> "WsiflowError":
        """Return the same error with slide, stage and path filled in where they were not known."""
        return _rebuild(type(self), self.failure.about(slide=slide, stage=stage, path=path))


def _rebuild(kind: type[WsiflowError], failure: Failure) -> WsiflowError:
    _, cause, remedy, slide, stage, path = failure
    return kind(cause, remedy, slide=slide, stage=stage, path=path)


class InputError(WsiflowError):
    """A slide, manifest, annotation, model card or setting cannot be used as it is."""

    exit_code = 20


class Rewritten(InputError):
    """A slide was written while it was read: what was read of it may be of no one content, whatever it holds now."""


class EnvironmentFault(WsiflowError):
    """The machine, file system or scheduler refused something that may work later or elsewhere."""

    exit_code = 30


class IntegrityError(WsiflowError):
    """A file is not what its receipt, hash or plan says it is."""

    exit_code = 40


# A slide that was written while it was read is an `InputError` to whoever is told of it afterwards.
_KINDS = (InputError, EnvironmentFault, IntegrityError)
