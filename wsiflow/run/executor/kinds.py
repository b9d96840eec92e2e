"""The kinds of executors, with the facts that are needed before their files are imported: Dask takes seconds.

To add a kind, write a file of its name with a function ``make(params, site)``, see `wsiflow.run.executor.factory`, and
add a line to `KINDS`. Settings of one kind alone are a field of `wsiflow.run.executor.params.ExecutorParams`.
"""

from typing import Literal, NamedTuple


class Kind(NamedTuple):
    """A kind of executor.

    Attributes:
        name: Name of the kind in the configuration, and of its file.
        size: Number of workers where ``executor.workers`` is 0. one: a single worker, whatever the configuration says.
            cores: one for each core of this machine. cluster: as many as the cluster gives.
        forks: Whether this process starts worker processes.
        has_client: Whether the workers are a Dask cluster, whose client the executor gets.
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
