"""Name the trials of a sweep, and tell a process what it has to know of the sweep that it belongs to.

Input: overrides, and what the sweep has left in the environment. Output: the names and folders of trials. Each trial
records how it ended in a folder that belongs to this sweep alone; one that leaves no record has failed.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import unicodedata
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser

from wsiflow import redaction
from wsiflow.errors import PARTIAL, InputError
from wsiflow.run import cases
from wsiflow.run.config import RunConfig
from wsiflow.system import exclusive

VARIABLE = "WSIFLOW_SWEEP"
_LONGEST_BYTES = 255  # of a name, on every common file system
_SHOWN_BYTES = 200  # of a name that is cut short
_UNSAFE = re.compile(r"[/\\?#%~]")  # ~ stands before the hash, so no plain name ends like a hashed one
_SECTION = re.compile(r"(?<![^,])[\w/@]+\.(?:[\w/@]+\.)*(?=[\w/@]+=)")  # inference. of inference.stride=56
# Sections whose overrides name a trial that differs from no other.
_SETTINGS = {"model", "geometry", "tissue", "tiles", "inference", "dense", "stain", "store", "lesions"}


class Trial(NamedTuple):
    """How a trial ended; one that left no record counts as a fault of the environment.

    Attributes:
        name: Name of the trial.
        exit_code: Its exit code.
        reason: Why it has no scores, where that is known.
        skipped: Whether it was not started, since this machine cannot do it.
        reported: Whether it has left a record.
    """

    name: str
    exit_code: int
    reason: str = ""
    skipped: bool = False
    reported: bool = True

    @property
    def failed(self) -> bool:
        """Whether the trial should have scores, and has none."""
        return self.exit_code not in {0, PARTIAL}


class TrialOverrides(NamedTuple):
    """Overrides of a trial, and those of them that differ from trial to trial."""

    overrides: list[str]
    swept: list[str]


def sweep_name_of(configured: str | None, run: str, out: Path) -> str:
    """Return the name of a sweep: the configured one, else that of its runs, or of its folder where these have none."""
    return configured or (run if run != "run" else out.name)


def sweep_name() -> str:
    """Return the name of the trials' parent in MLflow, empty where there is no sweep."""
    return str(shared()["name"]) if is_on() else ""


def sweep_folder() -> Path:
    """Return the folder of the sweep, which holds a folder for each trial."""
    return Path(shared()["out"])


def title(config: RunConfig) -> str:
    """Return a name for a run that tells it from others: of a trial its number and what was swept."""
    if not is_on():
        return config.name
    total = shared()["count"]
    return trial_title(HydraConfig.get().job.num + 1, total, config.out.name)


def trial_title(number: int, total: int, name: str) -> str:
    """Return how a trial is shown, such as ``trial 2 of 4: stride=56``; 0 in all where that is not known."""
    return f"{_place(number, total)}: {_SECTION.sub('', name)}"


def _place(number: int, total: int) -> str:
    return f"trial {number} of {total}" if total else f"trial {number}"


def jobs(overrides: Sequence[str], axes: Sequence[str] = ()) -> list[TrialOverrides]:
    """Return the trials into which Hydra's sweeper splits overrides, in its order.

    Args:
        overrides: The overrides that were typed.
        axes: Overrides of the chosen experiment; one that was typed replaces that of the same key.

    Raises:
        HydraException: An override cannot be parsed.
        InputError: The folder of the sweep is an axis, or an axis names no finite list of values.
    """
    texts, by_key, swept = [*axes, *overrides], dict[str, list[str]](), dict[str, None]()
    for text, override in zip(texts, OverridesParser.create().parse_overrides(texts), strict=True):
        key = override.get_key_element()
        swept.pop(key, None)
        by_key[key] = [text]
        if override.is_sweep_override():
            if not override.is_discrete_sweep():
                raise InputError(f"{text} names no values", f"list them: {key}=1,2,3", stage="configuration")
            by_key[key], swept[key] = [f"{key}={value}" for value in override.sweep_string_iterator()], None
    if "out" in swept:
        _refuse_out()
    varied = [key in swept for key in by_key]
    return [
        TrialOverrides(list(job), [text for text, varies in zip(job, varied, strict=True) if varies])
        for job in itertools.product(*by_key.values())
    ]


def fixed(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that are the same for every trial."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [text for text, override in zip(overrides, parsed, strict=True) if not override.is_sweep_override()]


def _refuse_out() -> None:
    raise InputError(
        "out is the folder of the whole sweep", "give one out=, in which each trial has a folder", stage="sweep"
    )


def trial_name(overrides: Sequence[str]) -> str:
    """Return the name of a trial: the overrides that differ from trial to trial, such as ``inference.stride=32``."""
    return name_of_job(_swept(overrides), overrides)


def name_of_job(swept: Sequence[str], overrides: Sequence[str]) -> str:
    """Return the name of a trial; one that differs from no other trial is named after its settings, or not at all."""
    named_by = swept or [text for text in overrides if re.split("[.=]", text.lstrip("+"))[0] in _SETTINGS]
    return folder_name(named_by, shared()["alike"])


def heading(number: int, name: str) -> str:
    """Return the words that say which trial of the sweep something is about, such as ``trial 2 of 4: stain=none``."""
    return f"{_place(number + 1, shared()['count'])}: {name}"


def is_grid(sweeper: Mapping[str, Any]) -> bool:
    """Tell whether a sweeper is Hydra's own, which runs every combination of the values that are listed."""
    return str(sweeper["_target_"]).endswith(".BasicSweeper")


def claim(root: Path, swept: Sequence[str]) -> None:
    """Claim a folder for a trial, so that no other trial uses it, even where a disk takes their names for one.

    Raises:
        InputError: Another trial has the folder.
    """
    path, text = root / cases.CLAIM, without_secrets(",".join(swept))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    draft.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(FileExistsError):  # the folder is claimed
        exclusive.give_name(draft, path)
    draft.unlink(missing_ok=True)
    owner = path.read_bytes().decode("utf-8", "surrogatepass")
    if owner != text:
        cause = f"the folder belongs to the trial {owner!r}, this one is {text!r}"
        raise InputError(cause, "choose another out= folder", stage="sweep", path=root)


def claim_own(root: Path, overrides: Sequence[str]) -> None:
    """Claim a folder for the trial of this process; see `claim`."""
    claim(root, _swept(overrides))


def _swept(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a trial that differ from trial to trial."""
    typed = dict(_parsed(shared()["overrides"]))  # of a key that was typed twice the last one counts
    swept = [
        text
        for text, (key, value) in zip(overrides, _parsed(overrides), strict=True)
        if key not in typed or typed[key] != value
    ]
    if any(text.startswith("out=") for text in swept):
        _refuse_out()
    return swept


def _parsed(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """Return key and value of overrides, since Hydra quotes values of a trial differently than they were typed."""
    return [
        (override.get_key_element(), override.value())
        for override in OverridesParser.create().parse_overrides(list(overrides))
    ]


def named(trials: Sequence[TrialOverrides]) -> dict[str, TrialOverrides]:
    """Return trials by the names of their folders, which differ on every disk."""
    alike = texts_alike(text for trial in trials for text in trial.swept)
    return {folder_name(trial.swept, alike): trial for trial in trials}


def texts_alike(texts: Iterator[str]) -> set[str]:
    """Return the texts that a disk may take for another one, but for the one of each kind that keeps its name."""
    by_form: dict[str, set[str]] = {}
    for text in texts:
        by_form.setdefault(unicodedata.normalize("NFKC", text).casefold(), set()).add(text)
    return {text for members in by_form.values() for text in sorted(members, reverse=True)[1:]}


def folder_name(swept: Sequence[str], alike: Collection[str] = ()) -> str:
    """Return the name of a trial's folder: its overrides, with a hash where these are unsafe, too long or ambiguous.

    Args:
        swept: The overrides.
        alike: Overrides of the sweep that a disk may take for others.
    """
    plain = ",".join(swept)
    public = redaction.without_secrets(plain)
    if public == plain and _is_safe(plain) and not any(text in alike for text in swept):
        return plain
    safe = _UNSAFE.sub("_", public.replace(redaction.REDACTED, "redacted"))
    printable = "".join(character if character.isprintable() else "_" for character in safe)
    return f"{printable.encode()[:_SHOWN_BYTES].decode(errors='ignore')}~{_digest(plain)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:10]


def without_secrets(text: str) -> str:
    """Return a text without its secrets, followed by a hash where it has any."""
    public = redaction.without_secrets(text)
    return text if public == text else f"{public}~{_digest(text)}"


def _is_safe(plain: str) -> bool:
    """Tell whether a text names one and the same folder on every disk."""
    return (
        plain.isprintable()
        and not _UNSAFE.search(plain)
        and plain == plain.strip(" .")
        and plain == unicodedata.normalize("NFC", plain)
        and len(plain.encode()) <= _LONGEST_BYTES
    )


def record_end(number: int, trial: Trial) -> None:
    """Record how a trial ended; one that cannot, since the sweep has ended or the disk is full, counts as failed."""
    with contextlib.suppress(OSError):
        (Path(shared()["folder"]) / f"{number}.json").write_text(json.dumps(trial), encoding="utf-8")


def is_on() -> bool:
    """Tell whether this process belongs to a sweep."""
    return VARIABLE in os.environ


def is_of_another_process() -> bool:
    """Tell whether another process drives the sweep of this trial, so that other trials may run at the same time."""
    return is_on() and shared()["pid"] != os.getpid()


def shared() -> dict[str, Any]:
    """Return what the sweep has left in the environment for its trials."""
    values: dict[str, Any] = json.loads(os.environ[VARIABLE])
    return values
