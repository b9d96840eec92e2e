"""Make the executor that a configuration names."""

import importlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from wsiflow.run.executor.kinds import KINDS
from wsiflow.run.executor.params import ExecutorParams
from wsiflow.run.executor.protocol import Executor, Site


def make(
    params: ExecutorParams,
    *,
    cores: int,
    root: Path,
    client: Any = None,
    needs: Sequence[Path] = (),
    numeric_class: Mapping[str, str] | None = None,
) -> AbstractContextManager[Executor]:
    """Return the executor that the parameters name.

    Args:
        params: The settings.
        cores: Number of cores that this process may use.
        root: The run's folder.
        client: The client of the Dask cluster, for kinds that have one.
        needs: Files and folders outside of the run's folder that every node has to see.
        numeric_class: The class of machines that the run is planned for; None where there is no plan yet.
    """
    module = importlib.import_module(f"{__package__}.{KINDS[params.kind].name}")
    executor: AbstractContextManager[Executor] = module.make(params, Site(cores, root, client, needs, numeric_class))
    return executor
