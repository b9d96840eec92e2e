"""The command that submits an array of elements, from the settings and what the array needs."""

import math
import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from wsiflow.errors import EnvironmentFault
from wsiflow.run.executor import bounds, element, jobs
from wsiflow.run.executor.dialect import ArrayParams
from wsiflow.run.executor.pieces import FOLDER, Request

_SCRIPT = f"{FOLDER}/element.sh"
_NAME_LETTERS = 24


class Form(NamedTuple):
    """What all arrays of a run have in common.

    Attributes:
        params: The settings.
        root: The run's folder.
        workers: Most elements of an array that run at a time; 0: all.
        threads: Number of threads of each element.
    """

    params: ArrayParams
    root: Path
    workers: int
    threads: int

    @property
    def script(self) -> Path:
        """The job script."""
        return self.root / _SCRIPT

    def job_name(self) -> str:
        """Return the beginning of the names of jobs: letters and digits, at first a letter."""
        name = self.params.job_name or self.root.name
        return re.sub(r"^(?![A-Za-z])", "r", re.sub(r"[^A-Za-z0-9]+", "_", name))[:_NAME_LETTERS].rstrip("_")

    def command(self, name: str, size: int, request: Request, logs: Path, *, for_test: bool = False) -> list[str]:
        """Return the command that submits an array.

        Args:
            name: Name of the array.
            size: Number of its elements.
            request: What each of them needs.
            logs: Folder of their logs.
            for_test: Whether the scheduler only tests it, see `test`.
        """
        params, dialect = self.params, self.params.dialect
        fields = {
            **request._asdict(),
            "memory_slot_mb": math.ceil(request.memory_mb / self.threads),
            "seconds": request.minutes * 60,
            "name": name,
            "first": dialect.base,
            "last": dialect.base + max(size, dialect.least) - 1,
            "running": min(params.throttle or self.workers or size, size),
            "logs": logs,
            "root": self.root,
            "script": self.script,
            "parallel_environment": params.parallel_environment,
            "memory_resource": params.memory_resource,
            "options": params.site_options(),
            "extra": params.extra,
            "command": [*(params.command or element.starter()), self.root / FOLDER / f"{name}.json"],
        }
        return dialect.submission(fields, threads=self.threads, variables=self.variables(), for_test=for_test)

    def variables(self) -> list[str]:
        """Return the names of the variables that elements get."""
        return element.variables(os.environ, self.params.environment)

    def environ(self) -> dict[str, str]:
        """Return the environment of the command: schedulers pass on, keep or show what they find there.

        A driver may itself run in a job, whose variables would change what is submitted.
        """
        dialect = self.params.dialect
        if not dialect.client:
            return dict(os.environ)
        needed = {*self.variables()}
        return {
            name: value for name, value in os.environ.items() if name in needed or re.fullmatch(dialect.client, name)
        }

    def unmet(self, command: Sequence[str]) -> str:
        """Return why an array can never run, in the words of a scheduler that would accept it and let it wait."""
        dialect = self.params.dialect
        if not dialect.unmet:
            return ""
        answer = self.test(command)
        is_unmet = answer.returncode and re.search(dialect.unmet, answer.stdout + answer.stderr)
        return refusal(answer, self.params) if is_unmet else ""

    def test(self, command: Sequence[str]) -> jobs.Answer:
        """Have the scheduler test a command without submitting anything."""
        return jobs.call([command[0], *self.params.dialect.test, *command[1:]], self.environ())


def refusal(answer: jobs.Answer, params: ArrayParams) -> str:
    """Return what a scheduler says of a command that it refused, in one line, as far as it is about its partition."""
    lines = (answer.stderr.strip() or answer.stdout.strip() or "no reason is given").splitlines()
    return " ".join(" ".join(params.dialect.of_partition(lines, params.partition)).split())


def preview(form: Form, request: Request, size: int) -> str:
    """Return what would be submitted, with all values, and what the scheduler says of it; nothing is submitted.

    Args:
        form: What arrays have in common.
        request: What an element needs at first.
        size: Number of elements.

    Raises:
        EnvironmentFault: Nothing here can meet the request, or the scheduler would refuse it.
    """
    script, name = element.script(form.params.prologue), f"{form.job_name()}-0"
    command = form.command(name, size, request, form.root / "logs" / name)
    lines = ["# " + str(form.script), script, shlex.join(map(str, command)), ""]
    lines.append(f"variables  {', '.join(form.variables())}")
    try:
        jobs.require_answer(form.params.dialect)
    except EnvironmentFault as fault:
        return "\n".join([*lines, f"not tested: {fault.cause}"])
    found = bounds.read(form.params)
    found.require(**request._asdict(), threads=form.threads)
    return "\n".join([*lines, f"bounds     {found.as_text()}", *_tested(form, name, script, request, size)])


def _tested(form: Form, name: str, script: str, request: Request, size: int) -> list[str]:
    """Return what the scheduler says of an array of some elements, in a line, where it tests without submitting.

    Raises:
        EnvironmentFault: It would refuse the array.
    """
    dialect = form.params.dialect
    if not dialect.test:
        return []
    with tempfile.TemporaryDirectory() as folder:  # the run's folder is not made before the run
        own = Path(folder) / form.script.name
        own.write_text(script, encoding="utf-8")
        tested = form.command(name, size, request, form.root / "logs" / name, for_test=True)
        answer = form.test([str(own) if part == str(form.script) else part for part in tested])
    said = refusal(answer, form.params)
    if answer.returncode and (not dialect.unmet or re.search(dialect.unmet, answer.stdout + answer.stderr)):
        raise EnvironmentFault(f"{dialect.name} would refuse this: {said}", "correct executor.array")
    return [f"{dialect.name:<10} {said}"]
