"""Which settings some runs have: the parameters in which they differ, a short name for each, and its repeats.

Input: finished runs. Output: a group of runs for each setting; runs with equal settings are repeats, whose scores must
be equal.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from wsiflow.analysis.runs import FinishedRun, natural_key
from wsiflow.errors import InputError
from wsiflow.evaluation import matches

# Parameters that are not settings: names, folders, tracking and orchestration, and what distinguishes repeats.
_NO_SETTING = re.compile(
    r"(name|out|share|seed|repeat|subsampled_from|orchestrator|allow_partial|shard_slides|evaluation\.bootstrap"
    r"|tracking\..*|compare\..*)"
)
# Parameters that mostly follow from other settings; shown only where nothing else distinguishes two settings.
_FOLLOWS = re.compile(r"(tiles|dense|executor|digest)\..*")
_SAME = 1e-5  # the same settings on another processor give probabilities that agree to about 1e-6
_KINDS = (".method", ".kind")  # select the option of a group, on which the meaning of its other parameters depends


def is_named(key: str, dotted: str) -> bool:
    """Tell whether a key names a parameter: by its dotted name, or by the end or the group of that."""
    return dotted in {key, f"{key}{_KINDS[0]}", f"{key}{_KINDS[1]}"} or dotted.endswith(f".{key}")


class Group(NamedTuple):
    """The runs of one setting, its name, and the values of the parameters that differ, by short and by dotted name."""

    name: str
    params: Mapping[str, str]
    runs: Sequence[FinishedRun]
    dotted: Mapping[str, str]


def group_runs(runs: Sequence[FinishedRun]) -> tuple[list[Group], list[str]]:
    """Return the settings in natural order, and a note on differing parameters that the names do not show."""
    keys = _differing(runs)
    swept = _swept(runs, keys)
    shown = swept or _distinguishing(runs, keys)
    values_of = [run.swept if swept else run.params for run in runs]
    shown.sort(key=lambda key: len({values.get(key, "") for values in values_of}))
    groups: dict[tuple[str, ...], list[FinishedRun]] = {}
    for run, values in zip(runs, values_of, strict=True):
        groups.setdefault(tuple(values.get(key, "") for key in shown), []).append(run)
    for members in groups.values():
        _refuse_unlike_repeats(members)
    short = _short(shown)
    texts = {key: _short_values([own[place] for own in groups]) for place, key in enumerate(shown)}
    named = []
    for own, members in sorted(groups.items(), key=lambda item: [natural_key(value) for value in item[0]]):
        params = {name: texts[key][value] for name, key, value in zip(short, shown, own, strict=True)}
        name = ", ".join(f"{key}={value}" for key, value in params.items()) or members[0].name
        named.append(Group(name, params, members, dict(zip(shown, params.values(), strict=True))))
    along = [key for key in keys if key not in shown]
    return named, [f"Differing along with the parameters shown: {', '.join(along)}."] if along else []


def _swept(runs: Sequence[FinishedRun], keys: Sequence[str]) -> list[str]:
    """Return the keys that the sweep of runs varied; none where these do not distinguish the runs as all settings do.

    What a user varied names a setting best: the choice of a group, for example, changes many parameters.
    """
    swept = [key for key in dict.fromkeys(key for run in runs for key in run.swept) if not _NO_SETTING.fullmatch(key)]
    pairs = {
        (tuple(run.swept.get(key, "") for key in swept), tuple(run.params.get(key, "") for key in keys)) for run in runs
    }
    by_sweep, by_settings = zip(*pairs, strict=True)
    return swept if len(pairs) == len(set(by_sweep)) == len(set(by_settings)) else []


def _differing(runs: Sequence[FinishedRun]) -> list[str]:
    """Return the settings, by dotted name, whose values are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.params)
    return [
        key for key in keys if not _NO_SETTING.fullmatch(key) and len({run.params.get(key, "") for run in runs}) > 1
    ]


def _distinguishing(runs: Sequence[FinishedRun], keys: Sequence[str]) -> list[str]:
    """Return a small subset of the parameters that distinguishes the runs as well as all parameters do.

    Parameters with many values and those that select a method are preferred; greedy removal of the others.
    """

    def n_distinct(some: Sequence[str]) -> int:
        return len({tuple(run.params.get(key, "") for key in some) for run in runs})

    def least(key: str) -> tuple[int, bool, bool, int]:
        values = len({run.params.get(key, "") for run in runs})
        return values, not _FOLLOWS.fullmatch(key), key.endswith(_KINDS), -len(key)

    kept, needed = list(keys), n_distinct(keys)
    for key in sorted(keys, key=least):
        others = [one for one in kept if one != key]
        if n_distinct(others) == needed:
            kept = others
    return kept


def _refuse_unlike_repeats(members: Sequence[FinishedRun]) -> None:
    """Refuse repeats of one setting whose scores differ.

    Raises:
        InputError: Two of them differ in the result of a slide; the message names the first such slide.
    """
    first = members[0]
    for other in members[1:]:
        odd = [
            one.slide_id
            for one, its in zip(first.matches.slides, _aligned(first, other), strict=True)
            if not _same(one, its)
        ]
        if odd:
            cause = f"{first.name} and {other.name} have the same settings and other scores, first for {odd[0]}"
            raise InputError(cause, "leave one of them out, or find out why their scores differ", stage="comparison")


def _aligned(first: FinishedRun, other: FinishedRun) -> list[matches.SlideRecord]:
    by_id = {one.slide_id.casefold(): one for one in other.matches.slides}
    return [by_id.get(one.slide_id.casefold(), one) for one in first.matches.slides]


def _same(one: matches.SlideRecord, other: matches.SlideRecord) -> bool:
    """Tell whether two results of a slide agree within 1e-5, as the same settings on two processors do."""
    ours, theirs = (
        [x.score, *(-1.0 if best is None else best for best in x.best), *sorted(x.false_positives)]
        for x in (one, other)
    )
    return len(ours) == len(theirs) and np.allclose(ours, theirs, rtol=0, atol=_SAME)


def common_settings(runs: Sequence[FinishedRun]) -> dict[str, str]:
    """Return the settings that have the same value in all runs."""
    return {
        key: value
        for key, value in runs[0].params.items()
        if not _NO_SETTING.fullmatch(key) and all(run.params.get(key) == value for run in runs)
    }


def _short(keys: Sequence[str]) -> list[str]:
    """Return the last part of each dotted name, or the whole name where that is ambiguous.

    A parameter that selects the option of a group, such as ``stain.method``, is called by its group.
    """
    last = [key.removesuffix(_KINDS[0]).removesuffix(_KINDS[1]).rpartition(".")[2] for key in keys]
    return [part if last.count(part) == 1 else key for part, key in zip(last, keys, strict=True)]


def _short_values(values: Sequence[str]) -> dict[str, str]:
    """Return a short form of each value: paths and digests are cut where the short forms stay distinct."""
    cut = {value: value.rpartition("/")[2][:40] for value in values}
    return cut if len(set(cut.values())) == len(cut) else {value: value for value in values}
