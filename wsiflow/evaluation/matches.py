"""Record an evaluation as ``matches.json``: the protocol, and truth, score and matches of every slide."""

from collections.abc import Sequence, Set
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from wsiflow.errors import InputError
from wsiflow.evaluation.froc import Matches
from wsiflow.evaluation.setting import Setting
from wsiflow.system import faults, publish

_Probability = Annotated[FiniteFloat, Field(ge=0, le=1)]


class SlideRecord(BaseModel, frozen=True):
    """One slide of ``matches.json``.

    Attributes:
        slide_id: Name of the slide.
        label: 1 for tumour, 0 for normal, None where it is not known.
        score: Slide score; higher means more likely tumour.
        in_froc: Whether the slide counts for FROC.
        in_auc: Whether the slide counts for the slide AUC.
        reason: Why the slide does not count for FROC or the AUC; else empty.
        truth: SHA-256 of the label and the annotated regions; None where they are not known.
        best: Highest confidence of a hit on each region; None for a missed region and for isolated tumour cells.
        n_itc: Number of the regions that are isolated tumour cells (ITC).
        itc: Indices of these regions, from 0.
        false_positives: Confidences of the detections outside every region.
        patient: Number of the slide's patient in this file; None where the patient is not known.
        itc_best: Highest confidence of a hit on each region of isolated tumour cells, in the order of ``itc``; empty in
            files of earlier versions.
        major_axis_um: Major axis of each region, joining distance included; empty in files of earlier versions.
    """

    slide_id: str
    label: Literal[0, 1] | None
    score: _Probability
    in_froc: bool
    in_auc: bool
    reason: str
    truth: str | None
    best: list[_Probability | None]
    n_itc: int = Field(ge=0)
    itc: list[int]
    false_positives: list[_Probability]
    patient: int | None = None
    itc_best: list[_Probability | None] = []
    major_axis_um: list[Annotated[FiniteFloat, Field(ge=0)]] = []


class EvaluationRecord(BaseModel, frozen=True):
    """The content of ``matches.json``.

    Attributes:
        protocol: Parameters of the scoring protocol by name.
        protocol_hash: SHA-256 of the protocol.
        slides: The scored slides, in the order of the manifest.
    """

    protocol: dict[str, Any]
    protocol_hash: str
    slides: list[SlideRecord]

    def truth_hash(self) -> str:
        """Return the SHA-256 of labels, truth, and what each slide counts for, in any order of the slides."""
        facts = [[one.slide_id.casefold(), one.label, one.in_froc, one.in_auc, one.truth] for one in self.slides]
        return publish.key_of(truth=sorted(facts, key=lambda fact: str(fact[0])))

    def setting(self, name: str) -> Setting:
        """Return the evaluation as a setting of a paired comparison."""
        counted = [one for one in self.slides if one.in_auc]
        return Setting(
            name=name,
            matches=[_as_matches(one) for one in self.slides if one.in_froc],
            slide_ids=tuple(one.slide_id for one in counted),
            scores=np.array([one.score for one in counted], np.float64),
            labels=np.array([one.label for one in counted], np.int64),
            protocol_hash=self.protocol_hash,
            truth={one.slide_id: one.truth for one in self.slides if one.truth is not None},
            clusters={one.slide_id: one.patient for one in self.slides if one.patient is not None},
        )


def read_matches(path: Path) -> EvaluationRecord:
    """Read the ``matches.json`` of an evaluation.

    Raises:
        InputError: The file cannot be read, or an evaluation did not write it; the message names the first wrong entry.
    """
    remedy = "give the matches.json that an evaluation of this version wrote"
    try:
        record = EvaluationRecord.model_validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise faults.unreadable(error, "the file of matches", remedy, path=path) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputError(f"{where}: {first['msg']}", remedy, path=path) from error
    if publish.key_of(**record.protocol) != record.protocol_hash:
        raise InputError("the protocol does not have the hash that the file states", remedy, path=path)
    seen: set[str] = set()
    for one in record.slides:
        cause = _contradiction(one, seen)
        if cause:
            raise InputError(cause, remedy, slide=one.slide_id, path=path)
        seen.add(one.slide_id.casefold())
    return record


def _as_matches(one: SlideRecord) -> Matches:
    best = _confidences(one.best)
    false = np.array(one.false_positives, np.float64)
    if len(one.major_axis_um) != len(best) or len(one.itc_best) != one.n_itc:
        return Matches(one.slide_id, best, one.n_itc, false, tuple(one.itc))
    any_best = best.copy()
    any_best[one.itc] = _confidences(one.itc_best)
    return Matches(
        one.slide_id, best, one.n_itc, false, tuple(one.itc), any_best, np.array(one.major_axis_um, np.float64)
    )


def _confidences(values: Sequence[float | None]) -> NDArray[np.float64]:
    return np.array([-np.inf if value is None else value for value in values], np.float64)


def _contradiction(one: SlideRecord, seen: Set[str]) -> str:
    """Return the contradiction in the record of a slide; empty where it is consistent."""
    if one.slide_id.casefold() in seen:
        return "the slide is recorded twice"
    if one.in_auc and one.label is None:
        return "the slide counts for the slide AUC and has no label"
    if len(one.itc) != one.n_itc or not all(0 <= k < len(one.best) and one.best[k] is None for k in one.itc):
        return f"itc {one.itc} does not fit n_itc {one.n_itc} and {len(one.best)} regions"
    return ""
