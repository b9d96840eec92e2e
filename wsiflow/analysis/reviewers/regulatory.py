"""Export one run for a regulatory review (``wsiflow export regulatory``), from the run's folder alone.

Input: the folder of a scored run. Output: a folder with

* ``study.imrmc``: the slide scores in the format of iMRMC, the MRMC software of FDA's DIDSR,
* ``case_list.csv`` and ``.sha256``: every slide of the manifest with its outcome,
* ``calibration.json``, ``.csv``, ``.png``: calibration of the slide scores, and of the cells where the truth is known,
* ``subgroups.csv``, ``.md``: scores by columns of the manifest,
* ``repeat.json`` and ``repeat.yaml``: everything that is needed to repeat the run,
* ``SHA256SUMS``: hashes of all of these.

Scores are those of ``matches.json``; none is computed again. The same run gives the same bytes.
"""

import hashlib
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from wsiflow import redaction
from wsiflow.analysis import scored
from wsiflow.analysis.reviewers import calibration, repeat, subgroups
from wsiflow.analysis.reviewers.format import Format, names
from wsiflow.analysis.reviewers.imrmc import study
from wsiflow.analysis.reviewers.subgroups import SubgroupOptions
from wsiflow.analysis.scored import ScoredRun
from wsiflow.errors import InputError
from wsiflow.system import publish, tables


class ExportOptions(NamedTuple):
    """What a regulatory export contains.

    Attributes:
        columns: Columns by whose values the slides are divided into subgroups.
        table: CSV with further columns of the slides, or None.
        threshold: A slide is positive from this score on, 0 to 1.
        cells: Whether the cells of the heatmaps are calibrated too.
    """

    columns: tuple[str, ...]
    table: Path | None
    threshold: float
    cells: bool


def export(root: Path, out: Path, options: ExportOptions) -> list[str]:
    """Write the regulatory export of one run to a folder.

    Args:
        root: The run's folder.
        out: The folder to write.
        options: What the export contains.

    Returns:
        Lines for the user: slides by outcome, what is missing from the export, and the files written.

    Raises:
        InputError: The run has no scores, or a column is unknown.
        IntegrityError: Slides and outcomes do not balance.
        EnvironmentFault: ``out`` cannot be written.
    """
    if not 0 <= options.threshold <= 1:
        raise InputError(f"the threshold is {options.threshold}", "give a probability, 0 to 1")
    run = scored.read(root)
    cases = scored.case_list(run)
    values = scored.values(run, options.columns, options.table)
    subgroup_options = SubgroupOptions(options.threshold, run.config.evaluation.bootstrap, run.config.seed)
    publish.preflight(out)
    files, notes = study(root, run)
    files |= _case_files(cases)
    files |= calibration.documents(run, cells=options.cells)
    files |= _subgroup_files(subgroups.table(run.record, values, subgroup_options))
    files["repeat.yaml"] = _repeat_yaml(run)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files["repeat.json"] = tables.json_text(repeat.document(run, options.table, digests)).encode()
    files["SHA256SUMS"] = _sums(files)
    for name, data in files.items():
        publish.write_view(out, name, data)
    counts = scored.counts(cases)
    balance = " + ".join(f"{counts[status]} {status}" for status in scored.STATUSES)
    return [
        f"slides     planned {counts['planned']} = {balance}",
        *notes,
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
    """Return the run's configuration as a file that replaces ``conf/config.yaml`` in Hydra.

    A trial of a sweep becomes a single run: it shares no files with other trials, and no sweep in MLflow.
    """
    settings = redaction.redacted(run.config.model_dump(mode="json"))
    settings |= {"share": None, "tracking": {**settings["tracking"], "sweep": None}}
    defaults = ["config", {"override dataset": run.config.dataset.kind}, "_self_"]
    head = "# wsiflow run --config-dir <folder of this file> --config-name repeat out=runs/again\n"
    text: str = yaml.safe_dump({"defaults": defaults, **settings}, sort_keys=False)
    return (head + text).encode()


def _sums(files: Mapping[str, bytes]) -> bytes:
    lines: Iterable[str] = (f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files))
    return "".join(lines).encode()


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--subgroups", type=names, default=(), help="columns of the manifest, separated by commas")
    parser.add_argument("--table", type=Path, help="CSV with slide_id and more columns to make subgroups of")
    parser.add_argument("--threshold", type=float, default=0.5, help="a slide is positive from this score on (0.5)")
    parser.add_argument("--no-cells", action="store_true", help="calibrate slide scores alone: reads no heatmap")


def _export(arguments: Namespace) -> list[str]:
    options = ExportOptions(arguments.subgroups, arguments.table, arguments.threshold, cells=not arguments.no_cells)
    return export(arguments.run, arguments.out, options)


FORMAT = Format("regulatory", "everything about one run, in a folder", _add_options, _export)
