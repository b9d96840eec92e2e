"""``wsiflow export``: what a reviewer asks of a run, from its folder alone.

Input: folders of runs that were scored. Output: iMRMC text, or a folder with

* ``study.imrmc``: the slide scores, as iMRMC of DIDSR reads them,
* ``case_list.csv`` and ``.sha256``: every slide of the manifest and what became of it,
* ``calibration.json``, ``.csv``, ``.png``: of the slide scores, and of the cells where the truth is known,
* ``subgroups.csv``, ``.md``: scores by columns of the manifest,
* ``repeat.json`` and ``repeat.yaml``: everything needed to get the number again,
* ``SHA256SUMS``: of all of these.

No score is computed anew here: they are those of ``matches.json``. The same run gives the same bytes.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from wsiflow import redaction
from wsiflow.analysis import scored
from wsiflow.analysis.reviewers import calibration, repeat, subgroups
from wsiflow.analysis.reviewers.imrmc import study
from wsiflow.analysis.scored import ScoredRun
from wsiflow.errors import InputError
from wsiflow.system import publish, tables


class Asked(NamedTuple):
    """What to export.

    Attributes:
        columns: Columns to make subgroups of.
        table: CSV with more columns of the slides, or None.
        threshold: A slide is positive from this score on.
        cells: Calibrate the cells of the heatmaps too.
    """

    columns: tuple[str, ...]
    table: Path | None
    threshold: float
    cells: bool


def export(root: Path, out: Path, asked: Asked) -> list[str]:
    """Write everything about one run to a folder, and return sentences about it.

    Raises:
        InputError: The run was not scored, or a column is unknown.
        IntegrityError: Slides and outcomes do not balance.
        EnvironmentFault: ``out`` cannot be written.
    """
    if not 0 <= asked.threshold <= 1:
        raise InputError(f"the threshold is {asked.threshold}", "give a probability, 0 to 1")
    run = scored.read(root)
    cases = scored.case_list(run)
    values = scored.values(run, asked.columns, asked.table)
    how = subgroups.How(asked.threshold, run.config.evaluation.bootstrap, run.config.seed)
    publish.preflight(out)
    files, told = study(root, run)
    files |= _case_files(cases)
    files |= calibration.documents(run, cells=asked.cells)
    files |= _subgroup_files(subgroups.table(run.record, values, how))
    files["repeat.yaml"] = _repeat_yaml(run)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files["repeat.json"] = tables.json_text(repeat.document(run, asked.table, digests)).encode()
    files["SHA256SUMS"] = _sums(files)
    for name, data in files.items():
        publish.write_view(out, name, data)
    found = scored.counts(cases)
    balance = " + ".join(f"{found[status]} {status}" for status in scored.STATUSES)
    return [
        f"slides     planned {found['planned']} = {balance}",
        *told,
        f"written    {', '.join(sorted(files))} to {out}",
    ]


def _case_files(cases: Sequence[scored.CaseRow]) -> dict[str, bytes]:
    data = tables.csv_text([row._asdict() for row in cases]).encode()
    digest = hashlib.sha256(data).hexdigest()
    return {"case_list.csv": data, "case_list.csv.sha256": f"{digest}  case_list.csv\n".encode()}


def _subgroup_files(rows: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    heads = ["column", "group", "slides", "tumour", "normal", "lesions", "AUC", "FROC score", "sensitivity"]
    shown = [
        [
            *(row[name] for name in heads[:6]),
            *(_with_interval(row, name) for name in ("auc", "froc", "sensitivity", "specificity")),
            row["note"],
        ]
        for row in rows
    ]
    page = tables.markdown([*heads, "specificity", "note"], shown)
    return {"subgroups.csv": tables.csv_text(rows).encode(), "subgroups.md": f"{page}\n".encode()}


def _with_interval(row: Mapping[str, Any], name: str) -> str:
    value, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if math.isnan(low) else f"{value:.3f} ({low:.3f} to {high:.3f})"


def _repeat_yaml(run: ScoredRun) -> bytes:
    """Return the run's configuration as one that Hydra takes in the place of the packaged one.

    A trial of a sweep becomes a run by itself: it takes nothing from the others, and does not join them in MLflow.
    """
    settings = redaction.redacted(run.config.model_dump(mode="json"))
    settings |= {"share": None, "tracking": {**settings["tracking"], "sweep": None}}
    head = "# wsiflow run --config-dir <folder of this file> --config-name repeat out=runs/again\n"
    text: str = yaml.safe_dump({"defaults": ["config", "_self_"], **settings}, sort_keys=False)
    return (head + text).encode()


def _sums(files: Mapping[str, bytes]) -> bytes:
    lines: Iterable[str] = (f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files))
    return "".join(lines).encode()
