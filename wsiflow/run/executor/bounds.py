"""The bounds that a scheduler sets to elements: the largest node, and the longest time of the partition.

A scheduler accepts some requests that it can never meet, and lets them wait for ever. So requests are compared with its
own listing of partitions or nodes before anything is submitted.
"""

import logging
import math
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from wsiflow.errors import EnvironmentFault
from wsiflow.run.executor import jobs
from wsiflow.run.executor.dialect import ArrayParams, megabytes, minutes

_logger = logging.getLogger(__name__)

_PARTITION = re.compile(r"(?<!\S)(?:-p\s*|--partition[= ])(\S+)")


class Bounds(NamedTuple):
    """The most that an element can get; infinite where the scheduler does not tell.

    Attributes:
        memory_mb: Memory of the largest node, MB.
        minutes: The longest time of the partition, minutes.
        cores: Number of cores of the largest node.
        where: Where these bounds hold, in words.
    """

    memory_mb: float = math.inf
    minutes: float = math.inf
    cores: float = math.inf
    where: str = "of this cluster"

    def as_text(self) -> str:
        """Return the bounds in words, without those that the scheduler does not tell."""
        values = ((self.memory_mb, "MB"), (self.minutes, "min"), (self.cores, "cores"))
        known = [f"{value:,.0f} {unit}" for value, unit in values if value < math.inf]
        return f"{', '.join(known)} {self.where}" if known else "unknown"

    def require(self, *, memory_mb: int, minutes: int, threads: int) -> None:
        """Refuse a request that nothing here can ever meet.

        Raises:
            EnvironmentFault: It exceeds a bound.
        """
        if not self.memory_mb:
            raise EnvironmentFault(f"there is no node {self.where}", "name another executor.array.partition")
        for what, value, bound, key in (
            ("MB", memory_mb, self.memory_mb, "executor.array.memory_mb"),
            ("cores", threads, self.cores, "executor.threads"),
        ):
            if value > bound:
                cause = f"no node {self.where} has {value:,} {what}, the largest has {bound:,.0f}"
                raise EnvironmentFault(cause, f"lower {key}, or name another executor.array.partition")
        if minutes > self.minutes:
            cause = f"no job {self.where} may run for {minutes:,} min, the limit is {self.minutes:,.0f}"
            remedy = "lower executor.array.minutes, or name another executor.array.partition"
            raise EnvironmentFault(cause, remedy)


def read(params: ArrayParams) -> Bounds:
    """Return the bounds of the partition that elements go to, over all partitions where it is not known which."""
    dialect = params.dialect
    if not dialect.bounds:
        return Bounds()
    try:
        answer = jobs.call(dialect.bounds)
    except EnvironmentFault:
        return Bounds()
    if answer.returncode:
        _logger.info("%s does not tell its bounds: %s", dialect.name, answer.stderr.strip())
        return Bounds()
    rows = [match.groupdict() for match in re.finditer(dialect.bound, answer.stdout, re.MULTILINE)]
    partitions = [*_partitions(params, os.environ, rows)] if "partition" in (rows or [{}])[0] else []
    of_these = [row for row in rows if row.get("partition") in partitions] if partitions else rows
    if not of_these:  # an unknown partition is refused by the scheduler, in its own words
        return Bounds()
    is_virtual = "vmem" in (params.memory_resource or "")  # address space, of which there may be more than memory
    where = f"of {' and '.join(partitions)}" if partitions else "of this cluster"
    return Bounds(
        math.inf if is_virtual else _largest(of_these, "memory", partial(megabytes, unit="M")),
        _largest(of_these, "time", minutes),
        _largest(of_these, "cores", float),
        where,
    )


def _largest(rows: Sequence[Mapping[str, str | None]], column: str, convert: Callable[[str], float]) -> float:
    """Return the largest value of a column; infinite where it is absent."""
    return max(math.inf if (text := row.get(column)) is None else convert(text) for row in rows)


def _partitions(
    params: ArrayParams, environ: Mapping[str, str], rows: Sequence[Mapping[str, str | None]]
) -> Sequence[str]:
    """Return the partitions that elements may go to, none where that is not known."""
    if params.partition:
        return params.partition.split(",")
    if typed := _PARTITION.search(shlex.join(params.extra)):
        return typed[1].split(",")
    if environ.get("SBATCH_PARTITION"):
        return environ["SBATCH_PARTITION"].split(",")
    return [*dict.fromkeys(row["partition"] or "" for row in rows if row.get("default"))]
