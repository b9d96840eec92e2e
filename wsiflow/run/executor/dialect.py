"""How a batch scheduler is spoken to, as data: commands with placeholders and patterns for what they answer.

Slurm, Grid Engine, PBS and LSF differ in words only; their words are in ``conf/executor/*_array.yaml``. A command is a
list of arguments, run without a shell. Each may hold placeholders; one that is nothing but a placeholder of a list
(``{extra}``) stands for all arguments of that list.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

from pydantic import BaseModel, Field, field_serializer, field_validator

from wsiflow.redaction import redacted_list

#: Why an element ended without finishing its tasks, as far as schedulers tell.
CAUSES = ("cancelled", "memory", "time", "node")


class Place(NamedTuple):
    """An element of an array: the unique name of the array and the element's index."""

    name: str
    number: int


class Seen(NamedTuple):
    """What the scheduler says of an element: the array's id and the element's state, in the scheduler's words."""

    job: str
    state: str


class Dialect(BaseModel, frozen=True, extra="forbid"):
    r"""One scheduler's words.

    Placeholders of ``submit``: ``{first}``, ``{last}``, ``{running}`` (elements at a time), ``{name}``,
    ``{memory_mb}``, ``{minutes}``, ``{seconds}``, ``{threads}``, ``{logs}`` (folder), ``{script}``, and the lists
    ``{slots}``, ``{memory}``, ``{environment}``, ``{extra}`` and ``{command}``.

    Attributes:
        name: The scheduler's name in messages.
        base: Index of the first element.
        least: Elements an array must have at least; what is beyond the table has nothing to do.
        index: Environment variable that holds an element's index.
        submit: Submits an array and prints its id.
        slots: Options that ask for more than one core, where more than one thread is used.
        memory: Options that ask for memory, where their names are the site's own.
        environment: Options that name the variables an element gets, ``{names}``, with commas; empty where it gets all.
        job_id: Finds ``job`` in what ``submit`` prints.
        whole: An array as the other commands name it, from ``{job}``.
        native: An element likewise, from ``{job}`` and ``{index}``.
        queue: Lists elements; ``{names}`` and ``{user}``.
        element: Finds ``job``, ``name``, ``state`` and ``tasks`` (``3``, ``1-4`` or ``1-9:2,12``) of each listed.
        alive: States of elements that wait or run.
        pending: Those of them in which an element has not begun: one that is gone from there was taken out.
        stuck: States of elements that never go on without help; they are cancelled and tried again.
        nothing: What failing commands say when they only mean that there is no such job.
        inspect: Tells how an element ended; ``{job}``, ``{index}``.
        causes: For some of `CAUSES`, what is found in the last state (as ``state=...``) or in what ``inspect`` prints;
            the first one that is found counts.
        cancel: Cancels; the list ``{jobs}``.
        limit: Tells the longest array that is accepted.
        limit_value: Finds ``limit`` in what that prints; 0 means none.
    """

    name: str
    base: int = Field(ge=0, le=1)
    least: int = Field(ge=1, le=2)
    index: str
    submit: tuple[str, ...]
    slots: tuple[str, ...]
    memory: tuple[str, ...]
    environment: tuple[str, ...] = ()  # not in older folders
    job_id: str
    whole: str
    native: str
    queue: tuple[str, ...]
    element: str
    alive: str
    pending: str
    stuck: str
    nothing: str
    inspect: tuple[str, ...]
    causes: Mapping[str, str]
    cancel: tuple[str, ...]
    limit: tuple[str, ...]
    limit_value: str

    @field_serializer("submit", "slots", "memory", when_used="json")
    def _without_secrets(self, arguments: tuple[str, ...]) -> list[str]:
        """Return arguments as files and servers may have them."""
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
            raise ValueError(f"{unknown} are no causes, there are {CAUSES}")
        return {name: _compiled(pattern) for name, pattern in value.items()}

    def submission(self, fields: Mapping[str, object], *, threads: int, variables: Sequence[str] = ()) -> list[str]:
        """Return the command that submits an array.

        Args:
            fields: Values of the placeholders, without ``slots``, ``memory``, ``environment`` and ``threads``.
            threads: Cores an element needs.
            variables: Names of the environment variables it needs.
        """
        known = {**fields, "threads": threads}
        lists = {
            "memory": expand(self.memory, known),
            "slots": expand(self.slots, known) if threads > 1 else [],
            "environment": expand(self.environment, {"names": ",".join(variables)}) if variables else [],
        }
        return expand(self.submit, {**known, **lists})

    def submitted(self, text: str) -> str:
        """Return the array's id from what the submission printed; empty where there is none."""
        found = re.search(self.job_id, text, re.MULTILINE)
        return found["job"] if found else ""

    def listed(self, text: str) -> dict[Place, Seen]:
        """Return every element that the queue's listing names."""
        return {
            Place(found["name"], index): Seen(found["job"], found["state"])
            for found in re.finditer(self.element, text, re.MULTILINE)
            for index in indices(found["tasks"])
        }

    def is_alive(self, state: str) -> bool:
        """Tell whether an element in this state waits or runs."""
        return re.fullmatch(self.alive, state) is not None and not self.is_stuck(state)

    def is_stuck(self, state: str) -> bool:
        """Tell whether an element in this state needs help."""
        return re.fullmatch(self.stuck, state) is not None

    def cause(self, state: str, told: str, *, began: bool) -> str:
        """Say why an element that is gone left tasks undone.

        Args:
            state: Its state when it was last listed; empty where it never was.
            told: What the scheduler tells of it; empty where it knows nothing.
            began: Whether it left anything on disk.

        Returns:
            One of `CAUSES`; ``killed`` where the scheduler knows it but not why; else ``lost``. What never began, was
            not seen but waiting and is unknown to its scheduler was taken from the queue.
        """
        if state and self.is_stuck(state):  # cancelled by the driver, whatever the scheduler says of that
            return "node"
        text = f"state={state}\n{told}"
        for name, pattern in self.causes.items():
            if re.search(pattern, text, re.MULTILINE):
                return name
        if told:
            return "killed"
        waited = not state or re.fullmatch(self.pending, state) is not None
        return "cancelled" if waited and not began else "lost"

    def longest(self, text: str) -> int:
        """Return how many elements an array may have; 0 where the text does not say or there is no limit."""
        found = re.search(self.limit_value, text, re.MULTILINE)
        return int(found["limit"]) if found else 0


class ArrayParams(BaseModel, frozen=True, extra="forbid"):
    """How array jobs are submitted and watched.

    Attributes:
        dialect: The scheduler's words.
        memory_mb: Memory to ask for, per element; doubled for what ran out of it.
        minutes: Wall time to ask for, per element; doubled for what ran out of it.
        memory_limit_mb: Memory never to ask more than.
        minutes_limit: Wall time never to ask more than.
        retries: How often a task is tried again after its element died.
        window: Elements in the queue at once, over all arrays of the run; fewer where `workers` is less.
        limit: Elements of one array; None asks the scheduler.
        poll_s: Seconds between two looks at the queue.
        grace_s: Seconds for which files of an element that is gone may still appear; a network file system needs them.
        extra: Options added to every submission, for example a partition.
        command: What starts wsiflow in an element; empty for this Python. A container is entered here.
        environment: More variables that elements get from the environment of the run, by name. Grid Engine and PBS show
            them with their values to every user of the cluster; Slurm and LSF pass on all there are and show none.
    """

    dialect: Dialect
    memory_mb: int = Field(ge=1)
    minutes: int = Field(ge=1)
    memory_limit_mb: int = Field(ge=1)
    minutes_limit: int = Field(ge=1)
    retries: int = Field(ge=0, le=20)
    window: int = Field(ge=2, le=1_000_000)
    limit: int | None = Field(ge=2)
    poll_s: float = Field(gt=0, le=3600)
    grace_s: float = Field(ge=0, le=3600)
    extra: tuple[str, ...]
    command: tuple[str, ...]
    environment: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], ...] = ()  # not in older folders

    @field_serializer("extra", "command", when_used="json")
    def _without_secrets(self, arguments: tuple[str, ...]) -> list[str]:
        """Return arguments as files and servers may have them."""
        return redacted_list(arguments)


def _compiled(pattern: str) -> str:
    """Return a pattern that is one.

    Raises:
        ValueError: It is none.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no pattern: {error}") from error
    return pattern


def expand(template: Sequence[str], fields: Mapping[str, object]) -> list[str]:
    """Fill in the placeholders of a command; a list that stands alone is spliced in as it is."""
    filled: list[str] = []
    for part in template:
        value = fields.get(part[1:-1]) if part.startswith("{") else None
        if isinstance(value, list | tuple):
            filled.extend(map(str, value))
        else:
            filled.append(part.format_map(fields))
    return filled


def indices(tasks: str) -> Iterator[int]:
    """Yield the indices of a compressed list such as ``1-9:2,12``."""
    for part in tasks.split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        yield from range(int(first), int(last or first) + 1, int(step or 1))
