"""Every error wsiflow raises on purpose, and the exit code each one ends a command with.

    WsiflowError                50  a defect of wsiflow itself
    +-- InputError              20  a slide, manifest, annotation, model or setting is wrong
    |   +-- SlideModified               a slide was written while it was read
    +-- EnvironmentFault        30  disk, permission, memory, scheduler
    +-- IntegrityError          40  a published file differs from what its receipt says

A complete run ends with 0, one that scored without some slides, as the user allowed, with `PARTIAL`.

A message is one line: slide, stage and file as far as they are known, the cause, and what to do about it; never with a
secret in it, since messages are kept in tables and sent to servers.
"""

from collections.abc import Callable
from typing import Any

from wsiflow.redaction import without_secrets

PARTIAL = 10


class WsiflowError(Exception):
    """A failure with a cause and a remedy, told in one line."""

    exit_code = 50

    def __init__(self, cause: str, remedy: str, *, slide: str = "", stage: str = "", path: object = "") -> None:
        """Keep what is known about the failure.

        Args:
            cause: What was wrong, with the value found and the bound or form expected.
            remedy: What the user can do about it.
            slide: The slide id, where one is concerned.
            stage: The step of the line, for example ``tissue`` or ``predict``.
            path: The file or folder concerned.
        """
        super().__init__(cause, remedy, slide, stage, path)
        self.cause, self.remedy = cause, remedy
        self.slide, self.stage, self.path = slide, stage, str(path)

    def __str__(self) -> str:
        """Join the parts into one line."""
        where = [f"slide {self.slide}"] if self.slide else []
        where += [part for part in (self.stage, self.path) if part]
        text = ": ".join(
            [", ".join(where), f"{self.cause}; {self.remedy}"] if where else [f"{self.cause}; {self.remedy}"]
        )
        return without_secrets(" ".join(text.split()))

    def __reduce__(self) -> tuple[Callable[..., "WsiflowError"], tuple[Any, ...]]:
        """Pickle with the keyword arguments, so that the error survives a process boundary."""
        return _rebuild, (type(self), self.cause, self.remedy, self.slide, self.stage, self.path)

    def about(self, *, slide: str = "", stage: str = "", path: object = "") -> "WsiflowError":
        """Return the same error with slide, stage and path filled in where they were not known."""
        return _rebuild(
            type(self), self.cause, self.remedy, self.slide or slide, self.stage or stage, self.path or str(path)
        )


def _rebuild(kind: type[WsiflowError], cause: str, remedy: str, slide: str, stage: str, path: str) -> WsiflowError:
    return kind(cause, remedy, slide=slide, stage=stage, path=path)


class InputError(WsiflowError):
    """A slide, manifest, annotation, model card or setting cannot be used as it is."""

    exit_code = 20


class SlideModified(InputError):
    """A slide was written while it was read: what was read of it may be of no one content, whatever it holds now."""


class EnvironmentFault(WsiflowError):
    """The machine, file system or scheduler refused something that may work later or elsewhere."""

    exit_code = 30


class IntegrityError(WsiflowError):
    """A file is not what its receipt, hash or plan says it is."""

    exit_code = 40
