"""What a scored set of slides is recorded as: ``matches.json``."""

from collections.abc import Set
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from wsiflow.errors import InputError
from wsiflow.evaluation.froc import Matches
from wsiflow.evaluation.paired import Setting
from wsiflow.system import faults, publish


class SlideRecord(BaseModel, frozen=True):
    """One slide of ``matches.json``.

    Attributes:
        slide_id: Name of the slide.
        label: 1 for tumour, 0 for normal, None where it is not known.
        score: How likely the slide holds tumour.
        in_froc: Whether it counts for FROC.
        in_auc: Whether it counts for the slide AUC.
        reason: Why it does not count for something, or empty.
        truth: SHA-256 of the label and of the true regions, None where they are not known.
        best: The highest confidence that hit each region, None where none did.
        n_itc: How many of the regions are isolated tumour cells.
        itc: Which ones, from 0.
        false_positives: Confidences of the detections outside every region.
        patient: Number of its patient in this file, None where it is not known.
    """

    slide_id: str
    label: Literal[0, 1] | None
    score: FiniteFloat
    in_froc: bool
    in_auc: bool
    reason: str
    truth: str | None
    best: list[FiniteFloat | None]
    n_itc: int = Field(ge=0)
    itc: list[int]
    false_positives: list[FiniteFloat]
    patient: int | None = None


class EvaluationRecord(BaseModel, frozen=True):
    """An evaluation as ``matches.json`` keeps it.

    Attributes:
        protocol: Every rule of scoring.
        protocol_hash: SHA-256 of the protocol.
        slides: What was scored, in the order of the manifest.
    """

    protocol: dict[str, Any]
    protocol_hash: str
    slides: list[SlideRecord]

    def truth_hash(self) -> str:
        """Return the SHA-256 of what the slides counted for and of their truth, in any order of the slides."""
        facts = [[one.slide_id.casefold(), one.label, one.in_froc, one.in_auc, one.truth] for one in self.slides]
        return publish.key_of(truth=sorted(facts, key=lambda fact: str(fact[0])))

    def setting(self, name: str) -> Setting:
        """Return it as a row of a comparison."""
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
        InputError: The file cannot be read, or is not what an evaluation writes; the first wrong entry is named.
    """
    remedy = "give the matches.json that an evaluation of this version wrote"
    try:
        found = EvaluationRecord.model_validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise faults.unreadable(error, "it", remedy, path=path) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputError(f"{where}: {first['msg']}", remedy, path=path) from error
    if publish.key_of(**found.protocol) != found.protocol_hash:
        raise InputError("its protocol does not have the hash it states", remedy, path=path)
    seen: set[str] = set()
    for one in found.slides:
        cause = _contradiction(one, seen)
        if cause:
            raise InputError(cause, remedy, slide=one.slide_id, path=path)
        seen.add(one.slide_id.casefold())
    return found


def _as_matches(one: SlideRecord) -> Matches:
    best = np.array([-np.inf if value is None else value for value in one.best], np.float64)
    return Matches(one.slide_id, best, one.n_itc, np.array(one.false_positives, np.float64))


def _contradiction(one: SlideRecord, seen: Set[str]) -> str:
    """Say what in the record of a slide cannot be, or nothing."""
    if one.slide_id.casefold() in seen:
        return "it is there twice"
    if one.in_auc and one.label is None:
        return "it counts for the slide AUC and has no label"
    if len(one.itc) != one.n_itc or not all(0 <= k < len(one.best) and one.best[k] is None for k in one.itc):
        return f"itc {one.itc} does not fit n_itc {one.n_itc} and {len(one.best)} regions"
    return ""
