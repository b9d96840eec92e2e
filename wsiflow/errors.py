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
from typing import Any

from wsiflow.redaction import without_secrets

PARTIAL = 10


class WsiflowError(Exception):
    """A failure that has a cause and a remedy, and whose message is one line."""

    exit_code = 50

    def __init__(self, cause: str, remedy: str, *, slide: str = "", stage: str = "", path: object = "") -> None:
        """Store the parts of the message.

        Args:
            cause: What was wrong, with the actual value and the bound or form that was expected.
            remedy: What the user can do about it.
            slide: Id of the slide that is concerned, if any.
            stage: Stage of the run, for example ``tissue`` or ``predict``, if any.
            path: File or folder that is concerned, if any.
        """
        super().__init__(cause, remedy, slide, stage, path)
        self.cause, self.remedy = cause, remedy
        self.slide, self.stage, self.path = slide, stage, str(path)

    def __str__(self) -> str:
        """Return the message: the parts joined into one line, without secrets."""
        where = [f"slide {self.slide}"] if self.slide else []
        where += [part for part in (self.stage, self.path) if part]
        text = ": ".join(
            [", ".join(where), f"{self.cause}; {self.remedy}"] if where else [f"{self.cause}; {self.remedy}"]
        )
        return without_secrets(" ".join(text.split()))

    def __reduce__(self) -> tuple[Callable[..., "WsiflowError"], tuple[Any, ...]]:
        """Pickle the keyword arguments too, so that an error of a worker process reaches its parent whole."""
        return _rebuild, (type(self), self.cause, self.remedy, self.slide, self.stage, self.path)

    def about(self, *, slide: str = "", stage: str = "", path: object = "") -> "WsiflowError":
        """Return a copy of the error in which slide, stage and path are filled in where they were empty."""
        return _rebuild(
            type(self), self.cause, self.remedy, self.slide or slide, self.stage or stage, self.path or str(path)
        )


def _rebuild(kind: type[WsiflowError], cause: str, remedy: str, slide: str, stage: str, path: str) -> WsiflowError:
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
