"""The dialect of a batch scheduler as data: its commands with placeholders, and patterns for their output.

The dialects of Slurm, Grid Engine, PBS and LSF are in ``conf/executor/*_array.yaml``. A command is a list of arguments
and is run without a shell. An argument may contain placeholders. An argument that is only the placeholder of a list,
such as ``{extra}``, is replaced by all arguments of that list.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

from pydantic import BaseModel, Field, field_serializer, field_validator

from wsiflow.redaction import redacted_list

#: The causes that schedulers report for an element that ended without finishing its tasks.
CAUSES = ("cancelled", "memory", "time", "node")


class Place(NamedTuple):
    """An element of an array: the unique name of the array and the element's index."""

    name: str
    number: int


class Seen(NamedTuple):
    """An element as the scheduler lists it: the id of the array, and the state in the scheduler's own words."""

    job: str
    state: str


class Dialect(BaseModel, frozen=True, extra="forbid"):
    r"""The dialect of one scheduler.

    Placeholders of ``submit``: ``{first}``, ``{last}``, ``{running}`` (elements at a time), ``{name}``,
    ``{memory_mb}``, ``{minutes}``, ``{seconds}``, ``{threads}``, ``{logs}`` (folder), ``{script}``, and the lists
    ``{slots}``, ``{memory}``, ``{environment}``, ``{extra}`` and ``{command}``.
    """

    name: str = Field(description="The scheduler's name in messages.")
    base: int = Field(ge=0, le=1, description="Index of an array's first element.")
    least: int = Field(
        ge=1, le=2, description="Least number of elements of an array; one without tasks of its own has nothing to do."
    )
    index: str = Field(description="Name of the environment variable that holds an element's index.")
    submit: tuple[str, ...] = Field(description="Command that submits an array and prints its id.")
    slots: tuple[str, ...] = Field(
        description="Options that ask for several cores, where an element has several threads."
    )
    memory: tuple[str, ...] = Field(description="Options that ask for memory, where their names are the site's own.")
    environment: tuple[str, ...] = Field(  # not in older folders
        default=(),
        description="Options that name the variables an element gets, {names}, with commas. Empty: it gets all there "
        "are.",
    )
    job_id: str = Field(description="Pattern that finds job in what submit prints.")
    whole: str = Field(description="An array as the other commands name it, from {job}.")
    native: str = Field(description="An element as the other commands name it, from {job} and {index}.")
    queue: tuple[str, ...] = Field(description="Command that lists elements; it may hold {names} and {user}.")
    element: str = Field(
        description="Pattern that finds job, name, state and tasks (3, 1-4 or 1-9:2,12) of each listed element."
    )
    alive: str = Field(description="Pattern of the states of elements that wait or run.")
    pending: str = Field(
        description="Pattern of those of them in which an element has not begun yet: one that is gone from there was "
        "taken out."
    )
    stuck: str = Field(
        description="Pattern of the states of elements that never go on without help; they are cancelled and tried "
        "again."
    )
    nothing: str = Field(
        description="Pattern of what failing commands say when they only mean that there is no such job."
    )
    inspect: tuple[str, ...] = Field(description="Command that tells how an element ended, from {job} and {index}.")
    causes: Mapping[str, str] = Field(
        description="Why an element ended (cancelled, memory, time, node), each with a pattern of its last state "
        "(state=...) or of what inspect prints; the first one that is found counts."
    )
    cancel: tuple[str, ...] = Field(description="Command that cancels the list {jobs}.")
    limit: tuple[str, ...] = Field(description="Command that prints the longest array that is accepted.")
    limit_value: str = Field(description="Pattern that finds limit in what the command limit prints; 0 means no limit.")

    @field_serializer("submit", "slots", "memory", when_used="json")
    def _without_secrets(self, arguments: tuple[str, ...]) -> list[str]:
        """Return the arguments with secrets redacted, for files and servers."""
        return redacted_list(arguments)

    @field_validator("job_id", "element", "alive", "pending", "stuck", "nothing", "limit_value")
    @classmethod
    def _is_pattern(cls, value: str) -> str:
        return _compiled(value)

    @field_validator("causes")
    @classmethod
    def _are_causes(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        unknown = sorted(set(value) - set(CAUSES))
        if unknown:
            raise ValueError(f"{unknown} are unknown causes, the causes are {CAUSES}")
        return {name: _compiled(pattern) for name, pattern in value.items()}

    def submission(self, fields: Mapping[str, object], *, threads: int, variables: Sequence[str] = ()) -> list[str]:
        """Return the command that submits an array.

        Args:
            fields: Values of the placeholders other than ``slots``, ``memory``, ``environment`` and ``threads``.
            threads: Number of cores that an element needs.
            variables: Names of the environment variables that an element needs.
        """
        known = {**fields, "threads": threads}
        lists = {
            "memory": expand(self.memory, known),
            "slots": expand(self.slots, known) if threads > 1 else [],
            "environment": expand(self.environment, {"names": ",".join(variables)}) if variables else [],
        }
        return expand(self.submit, {**known, **lists})

    def submitted(self, text: str) -> str:
        """Return the id of an array from the output of the submission; empty where there is none."""
        match = re.search(self.job_id, text, re.MULTILINE)
        return match["job"] if match else ""

    def listed(self, text: str) -> dict[Place, Seen]:
        """Return the elements in the output of the command that lists the queue."""
        return {
            Place(match["name"], index): Seen(match["job"], match["state"])
            for match in re.finditer(self.element, text, re.MULTILINE)
            for index in indices(match["tasks"])
        }

    def is_alive(self, state: str) -> bool:
        """Tell whether an element in this state waits or runs."""
        return re.fullmatch(self.alive, state) is not None and not self.is_stuck(state)

    def is_pending(self, state: str) -> bool:
        """Tell whether an element in this state has not begun."""
        return re.fullmatch(self.pending, state) is not None

    def is_stuck(self, state: str) -> bool:
        """Tell whether an element in this state never goes on without help."""
        return re.fullmatch(self.stuck, state) is not None

    def cause(self, state: str, report: str, *, began: bool) -> str:
        """Return why an element ended without finishing its tasks.

        Args:
            state: Its state when it was last listed; empty where it was never listed.
            report: The output of ``inspect``; empty where the scheduler does not know the element.
            began: Whether the element has written a file.

        Returns:
            One of `CAUSES`; ``killed`` where the scheduler knows the element, but no cause; else ``lost``. An element
            that never began, was only ever listed as waiting and is unknown to the scheduler was ``cancelled``.
        """
        if state and self.is_stuck(state):  # the driver cancelled it, which the scheduler would report as the cause
            return "node"
        text = f"state={state}\n{report}"
        for name, pattern in self.causes.items():
            if re.search(pattern, text, re.MULTILINE):
                return name
        if report:
            return "killed"
        waited = not state or self.is_pending(state)
        return "cancelled" if waited and not began else "lost"

    def longest(self, text: str) -> int:
        """Return the largest number of elements of an array from the output of ``limit``; 0 where it has none."""
        match = re.search(self.limit_value, text, re.MULTILINE)
        return int(match["limit"]) if match else 0


class ArrayParams(BaseModel, frozen=True, extra="forbid"):
    """How array jobs are submitted and watched."""

    dialect: Dialect = Field(description="The words of the batch scheduler.")
    memory_mb: int = Field(
        ge=1, description="Memory that is requested for an element, MB; doubled for one that ran out of it."
    )
    minutes: int = Field(
        ge=1, description="Wall time that is requested for an element, minutes; doubled for one that ran out of it."
    )
    memory_limit_mb: int = Field(ge=1, description="Most memory that is ever requested for an element, MB.")
    minutes_limit: int = Field(ge=1, description="Most wall time that is ever requested for an element, minutes.")
    retries: int = Field(ge=0, le=20, description="How often a task is tried again after its element died.")
    window: int = Field(
        ge=2,
        le=1_000_000,
        description="Most elements in the queue at a time, over all arrays of the run; fewer where executor.workers is "
        "less.",
    )
    limit: int | None = Field(ge=2, description="Most elements of one array. null: as the scheduler says.")
    poll_s: float = Field(gt=0, le=3600, description="Seconds between two looks at the queue.")
    grace_s: float = Field(
        ge=0,
        le=3600,
        description="Seconds for which files of an element that is gone may still appear, as on a network file system.",
    )
    idle_s: float = Field(  # not in older folders
        default=60,
        ge=0,
        le=86_400,
        description="Seconds for which an element without work waits for more before it ends.",
    )
    extra: tuple[str, ...] = Field(description="Options that every submission gets, such as a partition.")
    command: tuple[str, ...] = Field(
        description="Command that starts wsiflow in an element, such as in a container. Empty: this Python."
    )
    environment: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], ...] = Field(  # not in older folders
        default=(),
        description="Names of more variables that elements get from the run's environment. Grid Engine and PBS show "
        "them with their values to every user of the cluster; Slurm and LSF pass on all there are and show none.",
    )

    @field_serializer("extra", "command", when_used="json")
    def _without_secrets(self, arguments: tuple[str, ...]) -> list[str]:
        """Return the arguments with secrets redacted, for files and servers."""
        return redacted_list(arguments)


def _compiled(pattern: str) -> str:
    """Return a pattern after checking that it compiles.

    Raises:
        ValueError: It is not a regular expression.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    return pattern


def expand(template: Sequence[str], fields: Mapping[str, object]) -> list[str]:
    """Return a command with its placeholders filled in; an argument that is one list is replaced by its items."""
    filled: list[str] = []
    for part in template:
        value = fields.get(part[1:-1]) if part.startswith("{") else None
        if isinstance(value, list | tuple):
            filled.extend(map(str, value))
        else:
            filled.append(part.format_map(fields))
    return filled


def indices(tasks: str) -> Iterator[int]:
    """Yield the indices of a compressed list of ranges, such as ``1-9:2,12``."""
    for part in tasks.split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        yield from range(int(first), int(last or first) + 1, int(step or 1))
