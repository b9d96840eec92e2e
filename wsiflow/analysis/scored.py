"""Read a scored run from its folder: settings, cases, the outcome of every slide, scores and truth.

Input: a run's folder. Output: a `ScoredRun`, its complete list of cases, and values of the slides by column, taken from
the cases, the manifest or a table that the caller names.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from wsiflow.errors import InputError, IntegrityError
from wsiflow.evaluation import matches
from wsiflow.evaluation.matches import EvaluationRecord, SlideRecord
from wsiflow.run.cases import read_cases
from wsiflow.run.config import RunConfig
from wsiflow.run.plan import Plan, latest_plan
from wsiflow.run.stages import ingest
from wsiflow.slides.kinds import ManifestSlides
from wsiflow.slides.manifest import COLUMNS, Case, read_columns, read_manifest
from wsiflow.slides.names import slide_id
from wsiflow.system import tables

STATUSES = ("evaluated", "excluded", "failed", "rejected")
NOT_GIVEN = "(not given)"
"""Value of the slides that have none in a column, and name of the subgroup that they form."""

_CASE_COLUMNS = ("label", "patient_id", "split", "scanner")
_LABELS = {0: "normal", 1: "tumour", None: ""}


class SlideOutcome(NamedTuple):
    """Status and reason of one slide, from a row of ``process_list.csv``."""

    status: str
    reason: str


@dataclass(frozen=True, eq=False)
class ScoredRun:
    """A run with its scores.

    Attributes:
        root: The run's folder.
        folder: The folder of the scores in it: ``evaluation``, or ``evaluation-PARTIAL`` where slides are missing.
        config: The resolved configuration.
        cases: The slides of the run, in the order of the manifest.
        plan: The run's plan.
        outcomes: Status and reason of every slide, by slide id.
        record: The evaluation's record: truth, score and matches of every scored slide.
    """

    root: Path
    folder: Path
    config: RunConfig
    cases: tuple[Case, ...]
    plan: Plan
    outcomes: Mapping[str, SlideOutcome]
    record: EvaluationRecord

    @property
    def is_partial(self) -> bool:
        """Whether slides are missing from the scores."""
        return self.folder.name != "evaluation"

    @cached_property
    def slides(self) -> dict[str, SlideRecord]:
        """The evaluation's record of each scored slide, by slide id."""
        return {one.slide_id: one for one in self.record.slides}

    @cached_property
    def sha256(self) -> dict[str, str]:
        """SHA-256 of the content of each planned slide, by slide id."""
        return {slide.slide_id: slide.sha256 for slide in self.plan.slides}


class CaseRow(NamedTuple):
    """A slide of the manifest and its outcome in the run: a row of ``case_list.csv``.

    Attributes:
        slide_id: Name of the slide.
        status: One of `STATUSES`.
        reason: Why the slide is not evaluated, or does not count for FROC or the AUC; else empty.
        label: 1 for tumour, 0 for normal, empty where it is unknown.
        in_froc, in_auc: 1 where the slide counts for FROC, or for the slide AUC; else 0.
        score: Slide score; empty where there is none.
        slide_sha256: SHA-256 of the slide's content; of a slide that could not be opened, the manifest's value.
        truth_sha256: SHA-256 of the slide's label and annotated regions.
        patient_id, split, scanner: Values of the manifest.
        line: Line of the manifest, 0 where there is none.
    """

    slide_id: str
    status: str
    reason: str
    label: int | str
    in_froc: int
    in_auc: int
    score: float | str
    slide_sha256: str
    truth_sha256: str
    patient_id: str
    split: str
    scanner: str
    line: int


def read(root: Path) -> ScoredRun:
    """Read a scored run from its folder.

    Raises:
        InputError: The folder holds no run, or a run without scores.
        IntegrityError: The scored slides are not the slides that the run completed.
    """
    cases_path = ingest.newest_cases(root)
    if cases_path is None:
        raise InputError("the folder holds no run", "name the out= folder of a run", path=root)
    config, cases = read_cases(cases_path)
    outcomes = _outcomes(root / "process_list.csv")
    partial = any(one.status in {"failed", "rejected"} for one in outcomes.values())
    folder = root / ("evaluation-PARTIAL" if partial else "evaluation")
    if not (folder / "matches.json").is_file():
        cause = "slides are missing and nothing was scored" if partial else "the run was not scored by this version"
        remedy = f"run again{' with allow_partial=true' if partial else ''}, then export"
        raise InputError(cause, remedy, path=folder / "matches.json")
    record = matches.read_matches(folder / "matches.json")
    scored = ScoredRun(root, folder, config, cases, latest_plan(root), outcomes, record)
    _check_scores(scored)
    return scored


def case_list(scored: ScoredRun) -> list[CaseRow]:
    """Return a row for every slide of the manifest, also for slides that the run did not include.

    Raises:
        IntegrityError: A slide of the run has no outcome, or an outcome belongs to no slide.
    """
    planned = [*scored.cases, *_left_out(scored)]
    rows = [_case_row(scored, case) for case in planned]
    _check_balance(scored, planned, rows)
    return rows


def counts(rows: Iterable[CaseRow]) -> dict[str, int]:
    """Return the number of slides of every status, and their total as ``planned``."""
    by_status = Counter(row.status for row in rows)
    return {"planned": by_status.total(), **{status: by_status[status] for status in STATUSES}}


def values(scored: ScoredRun, columns: Sequence[str], table: Path | None) -> dict[str, dict[str, str]]:
    """Return the values of every scored slide, by column and slide id.

    Each column is taken from the first source that has it: the given table, the values that the run kept of its
    manifest (label, patient_id, split, scanner and its further columns), and the manifest as it is now, by the name in
    its header or by the column that this name is an alias of.

    Args:
        scored: The run.
        columns: Names of the columns; upper and lower case are the same.
        table: CSV with a column slide_id, or None.

    Raises:
        InputError: No source has a column, or a file cannot be used.
    """
    kept = _further(scored.cases)
    kept |= {name: {case.slide_id: _kept(case, name) for case in scored.cases} for name in _CASE_COLUMNS}
    sources = [_table(table) if table is not None else {}, kept]
    names = [name.strip().lower() for name in columns]
    if any(all(name not in source for source in sources) for name in names):
        sources.append(_manifest(scored))
        aliases = {alias: name for name in _CASE_COLUMNS for alias in COLUMNS[name]}
        sources.append({alias: kept[name] for alias, name in aliases.items()})
    by_column = {}
    for name in names:
        source = next((each for each in sources if name in each), None)
        if source is None:
            known = ", ".join(sorted({column for each in sources[:3] for column in each}))
            raise InputError(f"there is no column {name!r}", f"use one of {known}, or give --table", path=scored.root)
        by_column[name] = {
            one.slide_id: source[name].get(one.slide_id, "") or NOT_GIVEN for one in scored.record.slides
        }
    return by_column


def manifest(scored: ScoredRun) -> Path | None:
    """Return the path of a run's manifest; None where the run has none or the file no longer exists."""
    slides = scored.config.dataset
    return slides.manifest if isinstance(slides, ManifestSlides) and slides.manifest.is_file() else None


def _outcomes(path: Path) -> dict[str, SlideOutcome]:
    if not path.exists():
        raise InputError("the run has not ended yet", "let it end, or start it again", path=path)
    listed = tables.read(path, "the list of slides", "start the run again", ("slide_id", "status", "reason"))
    return {row["slide_id"]: SlideOutcome(row["status"], row["reason"]) for row in listed.rows()}


def _check_scores(scored: ScoredRun) -> None:
    good = {slide_id for slide_id, one in scored.outcomes.items() if one.status not in {"failed", "rejected"}}
    odd = sorted(good ^ {one.slide_id for one in scored.record.slides})
    if odd:
        cause = f"the scored slides are not those that the run completed: {', '.join(odd[:5])} differ"
        raise IntegrityError(cause, "run again, then export", path=scored.folder / "matches.json")


def _left_out(scored: ScoredRun) -> list[Case]:
    """Return the slides of the manifest that the run did not include: beyond ``dataset.limit``, or added since."""
    path = manifest(scored)
    if path is None:
        return []
    taken = {case.slide_id for case in scored.cases}
    return [case for case in read_manifest(path) if case.slide_id not in taken]


def _case_row(scored: ScoredRun, case: Case) -> CaseRow:
    status, reason = _outcome(scored, case.slide_id)
    one = scored.slides.get(case.slide_id)
    label = one.label if one is not None else case.label
    return CaseRow(
        slide_id=case.slide_id,
        status=status,
        reason=reason,
        label="" if label is None else label,
        in_froc=int(one is not None and one.in_froc),
        in_auc=int(one is not None and one.in_auc),
        score=one.score if one is not None else "",
        slide_sha256=scored.sha256.get(case.slide_id, case.sha256),
        truth_sha256=(one.truth or "") if one is not None else "",
        patient_id=case.patient_id,
        split=case.split,
        scanner=case.scanner,
        line=case.line,
    )


def _outcome(scored: ScoredRun, slide_id: str) -> tuple[str, str]:
    """Return the status of a slide and the reason for it."""
    outcome, one = scored.outcomes.get(slide_id), scored.slides.get(slide_id)
    if outcome is None:
        limit = scored.config.dataset.limit
        why = f"dataset.limit is {limit}" if limit is not None else "the manifest has changed since"
        return "excluded", f"not among the slides of the run: {why}"
    if one is None:
        return outcome.status, outcome.reason
    reason = one.reason or ("no tissue was found" if outcome.status == "no tissue" else "")
    return ("evaluated" if one.in_froc or one.in_auc else "excluded"), reason


def _check_balance(scored: ScoredRun, planned: Sequence[Case], rows: Sequence[CaseRow]) -> None:
    """Check that every slide has one outcome, and that every outcome belongs to a slide.

    Raises:
        IntegrityError: A slide has no outcome, or an outcome no slide.
    """
    lost = sorted({case.slide_id for case in scored.cases} - scored.outcomes.keys())
    stray = sorted(scored.outcomes.keys() - {case.slide_id for case in scored.cases})
    n_outcomes = sum(counts(rows)[status] for status in STATUSES)
    if lost or stray or len({case.slide_id for case in planned}) != n_outcomes:
        odd = f"without an outcome: {', '.join(lost) or 'none'}; outcomes without a slide: {', '.join(stray) or 'none'}"
        raise IntegrityError(f"slides and outcomes do not balance ({odd})", "run again, then export", path=scored.root)


def _further(cases: Sequence[Case]) -> dict[str, dict[str, str]]:
    """Return the further columns of the manifest as it was, by the column's name and slide id."""
    values: dict[str, dict[str, str]] = {}
    for case in cases:
        for name, text in case.columns:
            values.setdefault(name, {})[case.slide_id] = text
    return values


def _kept(case: Case, column: str) -> str:
    return _LABELS[case.label] if column == "label" else str(getattr(case, column))


def _table(path: Path) -> dict[str, dict[str, str]]:
    """Read a CSV of slides and return its values by column and slide id."""
    header, rows = tables.read(path, "the table of slides", "correct the path")
    if "slide_id" not in header:
        cause = "the table has no column slide_id"
        raise InputError(cause, "give a CSV with slide_id and any other columns", path=path)
    ids = [slide_id(cells[header.index("slide_id")]) for _, cells in rows]
    twice = [slide_id for slide_id, n in Counter(ids).items() if n > 1]
    if twice:
        raise InputError(f"slide {twice[0]} has {ids.count(twice[0])} lines", "give each slide one line", path=path)
    cells = [row for _, row in rows]
    return {
        name: dict(zip(ids, (row[place] for row in cells), strict=True))
        for place, name in enumerate(header)
        if name != "slide_id"
    }


def _manifest(scored: ScoredRun) -> dict[str, dict[str, str]]:
    """Read every column of the manifest as it is now, by slide id; empty where the run has no manifest."""
    path = manifest(scored)
    if path is None:
        return {}
    return read_columns(path)
