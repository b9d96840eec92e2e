"""What the trials of a sweep have in common is computed once: by the first that needs it, for all.

The shared folder is published like a run's, see `wsiflow.system.publish`; a file's name there is its *address*, the
hash of all that decides its bytes: its name and key in a run, versions, numeric class. A trial computes a file under
its address and then links it into its own folder; one that finds the address taken links what is there. Of two that
compute the same at once, one publishes and both link its file. Links keep what they name: a trial's folder is whole
without the others, and without the shared one.

Shared are a slide's tissue, its pixels and its colours: what settings of inference do not touch. Scores are not, since
what they cost is what trials are compared by.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from wsiflow.system import publish
from wsiflow.system.provenance import NUMERICS, numeric_class, versions

_LARGE_BYTES = 1 << 26  # whoever reads larger files compares every chunk with its checksum


class SharedFile(NamedTuple):
    """Where a file of a run belongs.

    Attributes:
        shared: The folder that trials share, None where they share nothing.
        root: The run's folder.
        name: The file's name, relative to the run's folder.
        key: What identifies its content among the files of the run.
    """

    shared: Path | None
    root: Path
    name: str
    key: str

    @property
    def address(self) -> str:
        """Name of the file in the shared folder."""
        environment = {"versions": versions(), "numeric_class": numeric_class(), "numerics": NUMERICS}
        return publish.key_of(name=self.name, key=self.key, **environment)


def done(place: SharedFile) -> publish.Receipt | None:
    """Return the receipt of a file that is published in the run's folder, or was made for another trial; else None.

    A file of another trial is linked into the run's folder; its receipt has the seconds it took when it was made.

    Raises:
        IntegrityError: A receipt is there, but for another key, or the file is not what the receipt says.
        EnvironmentFault: The file system refused.
    """
    receipt = publish.done_if_present(place.root, place.name, place.key)
    if receipt is not None or place.shared is None:
        return receipt
    other = find_receipt(place.shared, place.address)
    return None if other is None else _adopt(place, other | {"shared": True})


def find_receipt(shared: Path, address: str) -> publish.Receipt | None:
    """Return the receipt of what was published under an address, None where there is nothing.

    Raises:
        IntegrityError: The file is not what the receipt says.
    """
    receipt = publish.read_receipt(shared, address)
    if receipt is not None:
        publish.check(shared, receipt, largest=_LARGE_BYTES)
    return receipt


@contextmanager
def publishing(place: SharedFile, facts: dict[str, Any], verify: Callable[[Path], None]) -> Iterator[publish.Attempt]:
    """Publish a file in the run's folder, for other trials too where they share; see `publish.publishing`."""
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
