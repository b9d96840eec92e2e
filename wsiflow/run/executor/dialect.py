"""The dialect of a batch scheduler as data: its commands with placeholders, and patterns for their output.

The dialects of Slurm, Grid Engine, PBS and LSF are in ``conf/executor/*_array.yaml``. A command is a list of arguments
and is run without a shell. An argument may contain placeholders. An argument that is only the placeholder of a list,
such as ``{extra}``, is replaced by all arguments of that list.
"""

import fnmatch
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator, Field, field_serializer, field_validator, model_validator

from wsiflow.redaction import redacted_list

#: The causes that schedulers report for an element that ended without finishing its tasks. ``start``: it could not
#: start for a reason that another try does not change, such as a folder or a command that is missing.
#: ``preempted``: its cores were needed for other jobs.
CAUSES = ("start", "cancelled", "memory", "time", "node", "preempted")

#: What a site asks of jobs; the options for it are in the dialect.
SITE_KEYS = (
    *("partition", "account", "qos", "constraint", "reservation", "exclude"),
    *("resources", "mail", "comment"),
)

_NEAR = 0.8  # of what was requested must have been used by an element that exceeded it
_UNITS = {"": 1 / 2**20, "K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}  # to MB


class Place(NamedTuple):
    """An element of an array: the unique name of the array and the element's index."""

    name: str
    number: int


class Seen(NamedTuple):
    """An element as the scheduler lists it: the id of the array, and state and reason in the scheduler's own words."""

    job: str
    state: str
    reason: str = ""


class Given(NamedTuple):
    """What an element was given: memory in MB, and seconds."""

    memory_mb: int
    seconds: float


class Charge(NamedTuple):
    """What an element is charged for: cores, and seconds."""

    cores: int
    seconds: float


class Dialect(BaseModel, frozen=True, extra="forbid"):
    r"""The dialect of one scheduler.

    Placeholders of ``submit``: ``{first}``, ``{last}``, ``{running}`` (elements at a time), ``{name}``,
    ``{memory_mb}``, ``{memory_slot_mb}`` (of one thread), ``{minutes}``, ``{seconds}``, ``{threads}``, ``{logs}``
    (folder), ``{script}``, ``{parallel_environment}``, ``{memory_resource}``, and the lists ``{slots}``, ``{memory}``,
    ``{environment}``, ``{options}``, ``{extra}`` and ``{command}``.
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
    client: str = Field(  # this and what follows with a default: not in older folders
        default="",
        description="Pattern of the names of variables that the commands themselves need. Empty: they get all of them.",
    )
    options: Mapping[str, tuple[str, ...]] = Field(
        default={},
        description="Options for the keys of a site, such as executor.array.partition, with {value}, "
        "or {alternatives}, which | separates.",
    )
    own: Mapping[str, str] = Field(
        default={},
        description="Patterns of options that executor.array.extra may not hold, by the setting that decides them.",
    )
    test: tuple[str, ...] = Field(
        default=(), description="Words behind the first one of submit with which it only tests the submission."
    )
    unmet: str = Field(
        default="",
        description="Pattern of what a test says where nothing here can ever meet the request. Empty: only "
        "wsiflow run --script-only tests, since the scheduler refuses such arrays.",
    )
    full: str = Field(
        default="", description="Pattern of refusals that end by themselves: this user has too many jobs at present."
    )
    wrong: str = Field(default="", description="Pattern of refusals of a submission that no waiting cures.")
    bounds: tuple[str, ...] = Field(default=(), description="Command that lists partitions or nodes with their sizes.")
    bound: str = Field(
        default="",
        description="Pattern that finds partition, default, time, cores and memory there, as far as it tells them.",
    )
    reasons: tuple[str, ...] = Field(
        default=(),
        description="Command that tells why {whole}, an array or any other job, waits, where the queue does not list "
        "it; for jobs that are no arrays also where it does.",
    )
    of_queue: str = Field(
        default="",
        description="Pattern that finds queue, the one that a line of a reason or refusal is about. Lines about other "
        "queues than executor.array.partition are left out.",
    )
    verify: tuple[str, ...] = Field(
        default=(), description="Command that tells of {whole}, which waits, where it is unmet."
    )
    reason: str = Field(default="", description="Pattern that finds reason in what that command prints.")
    hopeless: str = Field(default="", description="Pattern of reasons for waiting that no waiting cures.")
    held: str = Field(default="", description="Pattern of reasons for waiting that somebody has to lift.")
    lives: str = Field(default="", description="Pattern of what inspect prints for an element that waits or runs.")
    words: str = Field(default="", description="Pattern of what is quoted of what inspect prints.")
    peak: str = Field(
        default="", description="Pattern that finds peak, the memory that a killed element had, in what inspect prints."
    )
    elapsed: str = Field(default="", description="Pattern that finds seconds, how long it ran, in what inspect prints.")
    charge: str = Field(
        default="", description="Pattern that finds cores and seconds, what an element cost, in what inspect prints."
    )
    blame: tuple[str, ...] = Field(
        default=(), description="Command that tells who stopped {job} and {index}, and why, where there is one."
    )
    by: str = Field(default="", description="Pattern that finds user in what that command prints.")
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
        description="Why an element ended (start, cancelled, memory, time, node, preempted), each with a pattern of "
        "its last state (state=...), of the reason given for it (reason=...) or of what inspect prints; the first one "
        "that is found counts."
    )
    cancel: tuple[str, ...] = Field(description="Command that cancels the list {jobs}.")
    limit: tuple[str, ...] = Field(description="Command that prints the longest array that is accepted.")
    limit_value: str = Field(description="Pattern that finds limit in what the command limit prints; 0 means no limit.")

    @field_serializer("submit", "slots", "memory", when_used="json")
    def _without_secrets(self, arguments: tuple[str, ...]) -> list[str]:
        """Return the arguments with secrets redacted, for files and servers."""
        return redacted_list(arguments)

    @field_validator(*("job_id", "element", "alive", "pending", "stuck", "nothing", "limit_value", "client", "unmet"))
    @classmethod
    def _is_pattern(cls, value: str) -> str:
        return _compiled(value)

    @field_validator(
        *(
            "full",
            "wrong",
            "bound",
            "reason",
            "hopeless",
            "held",
            "lives",
            "words",
            "peak",
            "elapsed",
            "charge",
            "by",
            "of_queue",
        )
    )
    @classmethod
    def _is_new_pattern(cls, value: str) -> str:
        return _compiled(value)

    @field_validator("options")
    @classmethod
    def _are_keys(cls, value: Mapping[str, tuple[str, ...]]) -> Mapping[str, tuple[str, ...]]:
        if unknown := sorted(set(value) - set(SITE_KEYS)):
            raise ValueError(f"{unknown} are no keys of a site, the keys are {SITE_KEYS}")
        return value

    @field_validator("causes")
    @classmethod
    def _are_causes(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        unknown = sorted(set(value) - set(CAUSES))
        if unknown:
            raise ValueError(f"{unknown} are unknown causes, the causes are {CAUSES}")
        return {name: _compiled(pattern) for name, pattern in value.items()}

    def submission(
        self, fields: Mapping[str, object], *, threads: int, variables: Sequence[str] = (), for_test: bool = False
    ) -> list[str]:
        """Return the command that submits an array.

        Args:
            fields: Values of the placeholders other than ``slots``, ``memory``, ``environment`` and ``threads``.
            threads: Number of cores that an element needs.
            variables: Names of the environment variables that an element needs.
            for_test: Whether the command is for a test that knows ``unmet`` requests, where memory is left out: what is
                free at present is unknown to it.
        """
        known = {**fields, "threads": threads}
        lists = {
            "memory": [] if for_test and self.unmet else expand(self.memory, known),
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
            Place(match["name"], index): Seen(match["job"], match["state"], match.groupdict().get("reason") or "")
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

    def cause(self, state: str, report: str, *, began: bool, reason: str = "", given: Given | None = None) -> str:
        """Return why an element ended without finishing its tasks.

        Args:
            state: Its state when it was last listed; empty where it was never listed.
            report: The output of ``inspect``; empty where the scheduler does not know the element.
            began: Whether the element has written a file.
            reason: The reason that the scheduler gave for its last state; empty where it gave none.
            given: What the element was given; None where unknown.

        Returns:
            One of `CAUSES`; ``killed`` where the scheduler knows the element, but no cause; else ``lost``. An element
            that never began, was only ever listed as waiting and is unknown to the scheduler was ``cancelled``.
        """
        if state and self.is_stuck(state):  # the driver cancelled it, which the scheduler would report as the cause
            return "start" if re.search(self.causes.get("start", "$^"), f"reason={reason}", re.MULTILINE) else "node"
        text = f"state={state}\nreason={reason}\n{report}"
        for name, pattern in self.causes.items():
            if re.search(pattern, text, re.MULTILINE):
                return self._as_measured(name, report, given) if given else name
        if report:
            return "killed"
        waited = not state or self.is_pending(state)
        return "cancelled" if waited and not began else "lost"

    def _as_measured(self, cause: str, report: str, given: Given) -> str:
        """Return a cause, or another one where the element used too little memory or time for it."""
        peak, elapsed = self._peak_mb(report), self._elapsed_s(report)
        exceeded = peak is not None and peak >= _NEAR * given.memory_mb
        if cause == "time" and elapsed is not None and elapsed < _NEAR * given.seconds:
            return "memory" if exceeded else "killed"
        if cause == "memory" and peak is not None and not exceeded:
            return "killed"
        return cause

    def _peak_mb(self, report: str) -> float | None:
        match = re.search(self.peak, report, re.MULTILINE) if self.peak else None
        return None if match is None else megabytes(match["peak"])

    def _elapsed_s(self, report: str) -> float | None:
        match = re.search(self.elapsed, report, re.MULTILINE) if self.elapsed else None
        return None if match is None else float(match["seconds"])

    def charged(self, report: str) -> Charge | None:
        """Return what the last start of an element is charged for; None where a report does not say it."""
        found = [*re.finditer(self.charge, report, re.MULTILINE)] if self.charge else []
        return Charge(int(found[-1]["cores"]), _seconds(found[-1]["seconds"])) if found else None

    def quoted(self, report: str) -> str:
        """Return what a report says of an element's end in the scheduler's own words; empty where it says nothing."""
        found = re.finditer(self.words, report, re.MULTILINE) if self.words else ()
        return ", ".join(dict.fromkeys(" ".join(match[0].split()) for match in found))

    def is_hopeless(self, reason: str) -> bool:
        """Tell whether elements that wait for this reason never start."""
        return bool(self.hopeless and re.search(self.hopeless, reason))

    def is_held(self, reason: str) -> bool:
        """Tell whether elements that wait for this reason start only when somebody acts."""
        return bool(self.held and re.search(self.held, reason))

    def explained(self, text: str, partition: str | None = None) -> str:
        """Return why an array for a partition waits, from the output of ``reasons``; empty where it does not tell."""
        found = re.finditer(self.reason, text, re.MULTILINE) if self.reason else ()
        return "; ".join(dict.fromkeys(self.of_partition([match["reason"].strip() for match in found], partition)))

    def of_partition(self, lines: Sequence[str], partition: str | None) -> Sequence[str]:
        """Return the lines of what a scheduler says that are not about other partitions; all where none is left."""
        if not self.of_queue or not partition:
            return lines
        wanted = [name.partition("@")[0] for name in partition.split(",")]
        queues = [match["queue"] if (match := re.search(self.of_queue, line)) else "" for line in lines]
        of_these = [
            line
            for line, queue in zip(lines, queues, strict=True)
            if not queue or any(fnmatch.fnmatchcase(queue, name) for name in wanted)
        ]
        return of_these or lines

    def never_runs(self, text: str) -> str:
        """Return why nothing here can ever run a job, from the output of ``verify``; empty where it may run."""
        lines = [line.strip() for line in text.splitlines() if re.search(self.unmet, line)]
        is_sure = self.unmet and not re.search("unknown resource", text)  # which is one that hosts measure
        return lines[0] if lines and is_sure else ""

    def longest(self, text: str) -> int:
        """Return the largest number of elements of an array from the output of ``limit``; 0 where it has none."""
        match = re.search(self.limit_value, text, re.MULTILINE)
        return int(match["limit"]) if match else 0


def _as_text(value: Any) -> Any:
    """Return a number as text, and a list as a text with commas."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Value = Annotated[Annotated[str, Field(pattern=r"^[^\s-][^\n]*$")] | None, BeforeValidator(_as_text)]
Words = tuple[str, ...]


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
    retries: int = Field(
        ge=0,
        le=20,
        description="How often a task is tried again after its element died, other than for lack of memory or time.",
    )
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
    throttle: int = Field(  # this and what follows: not in older folders
        default=0, ge=0, description="Most elements of an array that run at a time. 0: executor.workers, or all."
    )
    partition: Value = Field(default=None, description="Partition, or queue, of the elements.")
    account: Value = Field(default=None, description="Account, or project, that is charged.")
    qos: Value = Field(default=None, description="Quality of service.")
    constraint: Value = Field(default=None, description="Features that nodes must have, such as a kind of processor.")
    reservation: Value = Field(default=None, description="Reservation that elements use.")
    exclude: Value = Field(default=None, description="Nodes that no element may use.")
    resources: Value = Field(default=None, description="More resources that elements ask for, such as gpu=1.")
    mail: Value = Field(default=None, description="Address to which the scheduler writes when an array ends or fails.")
    comment: Value = Field(default=None, description="Comment that the scheduler keeps with the jobs.")
    job_name: Value = Field(
        default=None, description="Beginning of the names of jobs. null: the name of the run's folder."
    )
    parallel_environment: Value = Field(
        default=None, description="Parallel environment that elements with several threads ask for."
    )
    memory_resource: Value = Field(
        default=None, description="Resource by which memory is requested. It is divided by the threads of an element."
    )
    prologue: Words = Field(
        default=(), description="Lines of shell that every element runs first, such as module load openslide."
    )
    scratch: Value = Field(
        default=None,
        description="Folder on a disk of the node, such as $TMPDIR or /scratch, for temporary files and for files that "
        "are being written; they are copied to the run's folder when they are complete. null: they are written there.",
    )
    extra: Words = Field(
        description="More options of every submission: a list, or one text as it would be typed in a shell."
    )
    command: tuple[str, ...] = Field(
        description="Command that starts wsiflow in an element, such as in a container. Empty: this Python."
    )
    environment: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], ...] = Field(
        default=(),
        description="Names of more variables that elements get from the run's environment. Grid Engine and PBS show "
        "them with their values to every user of the cluster.",
    )

    @field_validator("extra", mode="before")
    @classmethod
    def _as_words(cls, value: Any) -> Any:
        """Return the words of a text; one in brackets is a list whose words Hydra could not read."""
        if isinstance(value, str) and (listed := re.fullmatch(r"\[(.*)\]", value.strip(), re.DOTALL)):
            return [word.strip().strip("'\"") for word in listed[1].split(",")]
        return shlex.split(value) if isinstance(value, str) else value

    @field_validator("prologue", mode="before")
    @classmethod
    def _as_lines(cls, value: Any) -> Any:
        return value.splitlines() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _has_options_for_all(self) -> "ArrayParams":
        for key in SITE_KEYS:
            if getattr(self, key) is not None and key not in self.dialect.options:
                known = ", ".join(self.dialect.options) or "none"
                raise ValueError(f"{self.dialect.name} has no option for executor.array.{key}, but for: {known}")
        typed = shlex.join(self.extra)
        for setting, pattern in self.dialect.own.items():
            if match := re.search(pattern, typed):
                raise ValueError(f"executor.array.extra holds {match[0].strip()!r}, which {setting} decides")
        return self

    def site_options(self) -> list[str]:
        """Return the options for the keys of the site that are set."""
        options: list[str] = []
        for key in SITE_KEYS:
            value = getattr(self, key)
            if value is not None:
                fields = {"value": value, "alternatives": value.replace(",", "|")}
                options += expand(self.dialect.options[key], fields)
        return options

    @field_serializer("extra", "command", "prologue", when_used="json")
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


def megabytes(text: str, unit: str = "") -> float:
    """Return a size such as ``1.5G`` in MB; without a unit it is in bytes, or in the given unit."""
    match = re.fullmatch(r"([\d.]+)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    return float(match[1]) * _UNITS[match[2].upper() or unit] if match else 0.0


def _seconds(text: str) -> float:
    """Return a duration in seconds: a number of them, or ``days-hours:minutes:seconds``."""
    return 60 * minutes(text) if ":" in text else float(text)


def minutes(text: str) -> float:
    """Return a time limit in minutes: ``days-hours:minutes:seconds`` with any part of it, or ``infinite``."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        return math.inf
    days, first, second, third = (float(part or 0) for part in match.groups())
    if match[1]:
        return days * 1440 + first * 60 + second + third / 60
    return first * 60 + second + third / 60 if match[4] else first + second / 60


def indices(tasks: str) -> Iterator[int]:
    """Yield the indices of a compressed list of ranges, such as ``1-9:2,12``."""
    for part in tasks.split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        yield from range(int(first), int(last or first) + 1, int(step or 1))
