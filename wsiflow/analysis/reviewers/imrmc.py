"""Write slide scores for iMRMC: each run is a modality of a multi-reader multi-case (MRMC) study with one reader."""

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from wsiflow import __version__
from wsiflow.analysis import scored
from wsiflow.analysis.reviewers.format import Format, names
from wsiflow.analysis.scored import ScoredRun
from wsiflow.errors import InputError
from wsiflow.evaluation.matches import SlideRecord
from wsiflow.system import publish

READER = "wsiflow"
_FIELD = re.compile(r"[A-Za-z0-9._=+-]+")


def export_imrmc(roots: Sequence[Path], names: Sequence[str], out: Path) -> int:
    """Write the slide scores of runs as iMRMC text, one modality per run, and return the number of cases.

    Args:
        roots: Folders of runs over the same cases.
        names: Names of the modalities; empty for the names of the folders.
        out: The file to write.

    Raises:
        InputError: A run has no scores, the runs have different cases, or a name cannot be used.
        EnvironmentFault: The file cannot be written.
    """
    if names and len(names) != len(roots):
        cause = f"there are {len(names)} names for {len(roots)} runs"
        raise InputError(cause, "give --names one name per run")
    runs = [scored.read(root) for root in roots]
    text = imrmc_text(dict(zip(_modalities(roots, names), runs, strict=True)))
    publish.preflight(out.absolute().parent)
    publish.write_view(out.absolute().parent, out.name, text.encode())
    return sum(one.in_auc for one in runs[0].record.slides)


def imrmc_text(runs: Mapping[str, ScoredRun]) -> str:
    """Return runs as iMRMC text: free text, the sizes of the study, ``BEGIN DATA:``, and rows of four fields.

    A row is ``reader,case,modality,score``. Reader -1 states the truth of a case once, as 0 or 1 in the field of the
    score. iMRMC drops blanks inside fields, so cases whose names differ by blanks alone are refused.

    Args:
        runs: The runs by name of their modality.

    Raises:
        InputError: The runs have different cases or labels, or no tumour or no normal slide counts for the AUC.
    """
    cases = {name: {one.slide_id: one for one in run.record.slides if one.in_auc} for name, run in runs.items()}
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


def _modalities(roots: Sequence[Path], names: Sequence[str]) -> list[str]:
    """Return a name of the modality of every run: the given names, else those of the folders.

    Raises:
        InputError: iMRMC cannot read a name, or two names are equal.
    """
    modalities = list(names) or [root.absolute().name for root in roots]
    bad = [name for name in modalities if not _FIELD.fullmatch(name)]
    if bad:
        cause = f"the name {bad[0]!r} holds other characters than letters, digits and . _ = + -"
        raise InputError(cause, "give --names, separated by commas")
    if len(set(modalities)) != len(modalities):
        cause = f"two runs are called {max(modalities, key=modalities.count)!r}"
        raise InputError(cause, "give --names, separated by commas")
    return modalities


def _same_cases(
    runs: Mapping[str, ScoredRun], cases: Mapping[str, Mapping[str, SlideRecord]], first: str, other: str
) -> None:
    """Refuse two runs that differ in their cases or labels.

    Raises:
        InputError: They differ; the message names the first cases.
    """
    ours, theirs = cases[first], cases[other]
    odd = sorted(ours.keys() ^ theirs.keys())
    remedy = "export runs over the same slides, protocol and truth together"
    if odd:
        cause = f"this run has other cases than {runs[first].root}: {', '.join(odd[:5])} in one of them only"
        raise InputError(cause, remedy, path=runs[other].root)
    relabelled = [slide_id for slide_id in ours if ours[slide_id].label != theirs[slide_id].label]
    if relabelled:
        cause = f"this run has other labels than {runs[first].root}: {', '.join(relabelled[:5])}"
        raise InputError(cause, remedy, path=runs[other].root)


def study(root: Path, run: ScoredRun) -> tuple[dict[str, bytes], list[str]]:
    """Return ``study.imrmc`` of a run by name; or no file and a note with the reason, for an export without it."""
    name = root.absolute().name
    try:
        return {"study.imrmc": imrmc_text({name if _FIELD.fullmatch(name) else "run": run}).encode()}, []
    except InputError as error:
        return {}, [f"no study.imrmc: {error.cause}"]


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run: one modality")
    parser.add_argument("--names", type=names, default=(), help="names of the modalities, separated by commas")
    parser.add_argument("--out", type=Path, required=True, help="file to write")


def _export(arguments: Namespace) -> list[str]:
    n_cases = export_imrmc(arguments.runs, arguments.names, arguments.out)
    return [f"{len(arguments.runs)} modalities, {n_cases} cases: {arguments.out}"]


FORMAT = Format("imrmc", "slide scores of runs over the same cases, as iMRMC reads them", _add_options, _export)
