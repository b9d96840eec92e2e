"""Share files between the trials of a sweep: a file that several trials need is computed once.

Files are published in the shared folder as in a run's folder, see `wsiflow.system.publish`. The name of a file there is
its *address*: the hash of everything that decides its bytes, which are its name and key in a run, the versions and the
numeric class. A trial publishes a file under its address, and then links it into its own folder. Where the address is
taken, the trial links the file that is there. Where two trials compute the same file at once, one publishes it and both
link it. Because links keep the file, the folder of a trial is whole without the other trials and the shared folder.

The tissue, the pixels and the colours of a slide are shared, because settings of inference do not change them. Scores
are not shared, because trials are compared by what scores cost.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from wsiflow.system import publish
from wsiflow.system.provenance import NUMERICS, numeric_class, versions

_LARGE_BYTES = 1 << 26  # readers of larger files compare every chunk with its checksum


class SharedFile(NamedTuple):
    """A file of a run that other trials may share.

    Attributes:
        shared: The folder that trials share; None where they share nothing.
        root: The run's folder.
        name: Name of the file, relative to the run's folder.
        key: Key of the file in the run.
    """

    shared: Path | None
    root: Path
    name: str
    key: str

    @property
    def address(self) -> str:
        """The name of the file in the shared folder."""
        environment = {"versions": versions(), "numeric_class": numeric_class(), "numerics": NUMERICS}
        return publish.key_of(name=self.name, key=self.key, **environment)


def done(place: SharedFile) -> publish.Receipt | None:
    """Return the receipt of a file that this run or another trial has published, else None.

    The file of another trial is linked into the run's folder. Its receipt has the seconds that the other trial took.

    Raises:
        IntegrityError: The receipt has another key, or the file differs from its receipt.
        EnvironmentFault: The file system refuses an operation.
    """
    receipt = publish.done_if_present(place.root, place.name, place.key)
    if receipt is not None or place.shared is None:
        return receipt
    other = find_receipt(place.shared, place.address)
    return None if other is None else _adopt(place, other | {"shared": True})


def find_receipt(shared: Path, address: str) -> publish.Receipt | None:
    """Return the receipt of the file that is published under an address, or None where there is none.

    Raises:
        IntegrityError: The file differs from its receipt.
    """
    receipt = publish.read_receipt(shared, address)
    if receipt is not None:
        publish.check(shared, receipt, largest=_LARGE_BYTES)
    return receipt


@contextmanager
def publishing(place: SharedFile, facts: dict[str, Any], verify: Callable[[Path], None]) -> Iterator[publish.Attempt]:
    """Publish a file in the run's folder, and in the shared folder where there is one; see `publish.publishing`."""
    if place.shared is None:
        with publish.publishing(place.root, place.name, place.key, facts, verify) as attempt:
            yield attempt
        return
    with publish.publishing(place.shared, place.address, place.key, facts, verify) as attempt:
        yield attempt
    attempt.receipt = _adopt(place, attempt.receipt)


def _adopt(place: SharedFile, receipt: publish.Receipt) -> publish.Receipt:
    assert place.shared is not None, "only what is shared is adopted"
    return publish.adopt(place.root, place.name, place.shared / receipt["path"], receipt)
