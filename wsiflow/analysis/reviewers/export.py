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
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from wsiflow import __version__, redaction
from wsiflow.analysis import scored
from wsiflow.analysis.reviewers import calibration, repeat, subgroups
from wsiflow.analysis.scored import Scored
from wsiflow.errors import InputError
from wsiflow.evaluation import evaluate
from wsiflow.evaluation.evaluate import RecordedSlide
from wsiflow.system import publish, tables

READER = "wsiflow"

_FIELD = re.compile(r"[A-Za-z0-9._=+-]+")


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


def export_imrmc(roots: Sequence[Path], names: Sequence[str], out: Path) -> int:
    """Write the slide scores of runs as iMRMC text, a modality per run, and return the number of cases.

    Args:
        roots: Folders of runs over the same cases.
        names: Names of the modalities; none: the names of the folders.
        out: The file.

    Raises:
        InputError: A run was not scored, the runs are over different cases, or a name cannot be used.
    """
    if names and len(names) != len(roots):
        raise InputError(f"{len(names)} names for {len(roots)} runs", "give --names one name per run")
    runs = [scored.read(root) for root in roots]
    text = imrmc_text(dict(zip(_modalities(roots, names), runs, strict=True)))
    publish.preflight(out.absolute().parent)
    publish.write_view(out.absolute().parent, out.name, text.encode())
    return sum(one.in_auc for one in runs[0].recorded.slides)


def imrmc_text(runs: Mapping[str, Scored]) -> str:
    """Return runs as iMRMC text: free text, the sizes of the study, ``BEGIN DATA:``, and rows of four fields.

    A row is ``reader,case,modality,score``; reader -1 states the truth of a case, once: 0 or 1 in the field of the
    score. iMRMC drops blanks inside fields, so cases whose names differ by them alone are refused.

    Args:
        runs: The runs by modality.

    Raises:
        InputError: The runs are over different cases, or have no tumour or no normal slide.
    """
    cases = {name: {one.slide_id: one for one in run.recorded.slides if one.in_auc} for name, run in runs.items()}
    first, *others = cases
    for other in others:
        _same_cases(runs, cases, first, other)
    labels = {slide_id: one.label for slide_id, one in cases[first].items()}
    n_normal, n_tumour = (sum(label == of for label in labels.values()) for of in (0, 1))
    if not (n_normal and n_tumour):
        cause = f"{n_tumour} tumour and {n_normal} normal slides count for the AUC"
        raise InputError(cause, "iMRMC needs both: give labels in the manifest", path=runs[first].root)
    fields = {slide_id: "".join(slide_id.split()) for slide_id in labels}
    if len(set(fields.values())) != len(fields):
        cause = "names of slides differ by blanks alone, which iMRMC drops"
        raise InputError(cause, "rename slides in the manifest", path=runs[first].root)
    lines = [f"Slide scores, wsiflow {__version__}", "", "NR: 1", f"N0: {n_normal}", f"N1: {n_tumour}"]
    lines += [f"NM: {len(runs)}", "", "BEGIN DATA:"]
    lines += [f"-1,{fields[slide_id]},truth,{label}" for slide_id, label in labels.items()]
    lines += [
        f"{READER},{fields[slide_id]},{name},{of[slide_id].score!r}"
        for name, of in cases.items()
        for slide_id in labels
    ]
    return "\n".join(lines) + "\n"


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
    files, told = _study(root, run)
    files |= _case_files(cases)
    files |= calibration.documents(run, cells=asked.cells)
    files |= _subgroup_files(subgroups.table(run.recorded, values, how))
    files["repeat.yaml"] = _repeat_yaml(run)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files["repeat.json"] = evaluate.json_text(repeat.document(run, asked.table, digests)).encode()
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


def _modalities(roots: Sequence[Path], names: Sequence[str]) -> list[str]:
    """Return a name for every run that iMRMC can tell from the others."""
    found = list(names) or [root.absolute().name for root in roots]
    bad = [name for name in found if not _FIELD.fullmatch(name)]
    if bad:
        cause = f"the name {bad[0]!r} holds other characters than letters, digits and . _ = + -"
        raise InputError(cause, "give --names, separated by commas")
    if len(set(found)) != len(found):
        raise InputError(f"two runs are called {max(found, key=found.count)!r}", "give --names, separated by commas")
    return found


def _same_cases(
    runs: Mapping[str, Scored], cases: Mapping[str, Mapping[str, RecordedSlide]], first: str, other: str
) -> None:
    """Refuse runs over different cases or with other labels."""
    ours, theirs = cases[first], cases[other]
    odd = sorted(ours.keys() ^ theirs.keys())
    remedy = "export runs over the same slides, protocol and truth together"
    if odd:
        cause = f"it has other cases than {runs[first].root}: {', '.join(odd[:5])} in one of them only"
        raise InputError(cause, remedy, path=runs[other].root)
    relabelled = [slide_id for slide_id in ours if ours[slide_id].label != theirs[slide_id].label]
    if relabelled:
        cause = f"it has other labels than {runs[first].root}: {', '.join(relabelled[:5])}"
        raise InputError(cause, remedy, path=runs[other].root)


def _study(root: Path, run: Scored) -> tuple[dict[str, bytes], list[str]]:
    """Return the iMRMC text of a run, or a sentence why there is none: the other files are of use without it."""
    name = root.absolute().name
    try:
        return {"study.imrmc": imrmc_text({name if _FIELD.fullmatch(name) else "run": run}).encode()}, []
    except InputError as error:
        return {}, [f"no study.imrmc: {error.cause}"]


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


def _repeat_yaml(run: Scored) -> bytes:
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
