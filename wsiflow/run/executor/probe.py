"""A task that says where it ran: with it ``wsiflow doctor --cluster`` tries an executor."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

from wsiflow.run.executor.protocol import Outcome
from wsiflow.system import machine, provenance


def work(source: Path, stage: str, lo: int, hi: int) -> Iterator[Outcome]:
    """Do the tasks of a slice: each returns what its worker is, in place of a receipt."""
    for task in range(lo, hi):
        facts = {
            "host": socket.gethostname(),
            "cores": machine.job_cores(os.environ) or machine.allocated_cores(),
            "isa": machine.numeric_class(1)["isa"],
            "wsiflow": provenance.versions()["wsiflow"],
            "source": source.read_text(encoding="utf-8"),
            "stage": stage,
        }
        yield Outcome(task, facts, executed=True)
