"""The kinds of executors, and what is known of them without importing their files: Dask alone takes seconds.

To add one: a file of its name with a function ``make(params, site)``, see `wsiflow.run.executor.factory`, and a line in
`KINDS`. Settings that no other kind has are a field of `wsiflow.run.executor.params.ExecutorParams`.
"""

from typing import Literal, NamedTuple


class Kind(NamedTuple):
    """A kind of executor.

    Attributes:
        name: Its name in the configuration; its file is called so too.
        size: How many workers it has where ``executor.workers`` is 0: one, which it has in any case; one for each core
            of this machine; or as many as the cluster gives.
        forks: Whether this process starts workers.
        has_client: Whether its workers are a Dask cluster, whose client it is given.
    """

    name: str
    size: Literal["one", "cores", "cluster"]
    forks: bool = False
    has_client: bool = False

    @property
    def is_local(self) -> bool:
        """Whether all of the work is done on this machine."""
        return self.size != "cluster"


#: The kinds by name.
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("inline", "one"),
        Kind("process", "cores", forks=True),
        Kind("dask", "cluster", forks=True, has_client=True),
        Kind("array", "cluster"),
    )
}
