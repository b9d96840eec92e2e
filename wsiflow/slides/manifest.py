"""The slides of a run, read from a manifest, a folder or the path of a single slide.

Input: a CSV manifest, a folder of slides, or one slide. Output: a tuple of :class:`Case`, one per slide.

A manifest has the columns ``slide_id,path`` and any of ``mpp,label,annotation_path,mask_path,tissue_mask_path,roi_path,
patient_id,split,scanner,sha256``. Names that other tools use for these columns are accepted. Paths are relative to the
folder of the manifest. All errors of a manifest are reported at once, with line numbers. A slide file that does not
exist is not an error of the manifest: only that slide fails, when it is opened.
"""

import difflib
import errno
import math
import os
import re
import stat
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.slides import content, dialects
from wsiflow.slides.annotations.outlines import COMPANION_SUFFIXES
from wsiflow.slides.kinds import GivenSlides, ManifestSlides, SingleSlide
from wsiflow.system import tables
from wsiflow.system.tables import Line

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "slide_id": ("slide_id", "slide", "sample_id"),
    "path": ("path", "wsi", "image_path", "image", "slide_path", "wsi_path"),
    "mpp": ("mpp", "spacing_at_level_0", "spacing", "um_px"),
    "label": ("label", "type", "class"),
    "annotation_path": ("annotation_path", "annotation", "xml"),
    "mask_path": dialects.TRUTH_MASKS,
    "tissue_mask_path": ("tissue_mask_path", "tissue_mask", "tissue_path"),
    "roi_path": ("roi_path", "roi"),
    "patient_id": ("patient_id", "patient", "case_id"),
    "split": ("split", "subset"),
    "scanner": ("scanner", "center", "centre"),
    "sha256": ("sha256",),
}
"""The columns of a manifest, each with the names by which it is recognised."""

LABELS: Mapping[str, int] = {
    **dict.fromkeys(("0", "normal", "negative", "benign"), 0),
    **dict.fromkeys(("1", "tumor", "tumour", "positive", "metastasis", "micro", "macro"), 1),
}
SLIDE_SUFFIXES = frozenset(
    {".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".dcm", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi"}
)

_SLIDE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Case:
    """One slide of a run and what is known about it before it is opened.

    Attributes:
        slide_id: Name that is unique even if case is ignored, and safe as a file name.
        path: Absolute path of the slide file, which may not exist.
        mpp: Micrometres per level-0 pixel; None for the value that the slide states.
        label: 1 for tumour, 0 for normal, None where it is unknown.
        annotation_path: Existing file with annotated outlines, of a format of `wsiflow.slides.annotations`, or None.
        mask_path: Existing mask image of annotated tumour, or None.
        patient_id: Id of the patient, or an empty text.
        split: Part of the data set, for example ``train`` or ``test``, or an empty text.
        scanner: Scanner or centre, or an empty text.
        sha256: Expected hash of the slide, or an empty text.
        line: Line number in the manifest, or 0 without a manifest.
        tissue_mask_path: Existing file that says where tissue is, for ``tissue=given``, or None.
        roi_path: Existing file of the regions of interest, or None.
    """

    slide_id: str
    path: Path
    mpp: float | None = None
    label: int | None = None
    annotation_path: Path | None = None
    mask_path: Path | None = None
    patient_id: str = ""
    split: str = ""
    scanner: str = ""
    sha256: str = ""
    line: int = 0
    tissue_mask_path: Path | None = None
    roi_path: Path | None = None


def load_dataset(params: GivenSlides) -> tuple[Case, ...]:
    """Return the slides that the settings name, at most ``limit`` of them.

    Raises:
        InputError: The manifest, folder or file that the settings name is unusable.
        EnvironmentFault: The system refuses to read it.
    """
    if isinstance(params, ManifestSlides):
        cases = read_manifest(params.manifest)
    else:
        cases = read_single(params.path) if isinstance(params, SingleSlide) else read_folder(params.folder)
    return cases[: params.limit]


def read_manifest(path: Path) -> tuple[Case, ...]:
    """Read a CSV manifest.

    Args:
        path: UTF-8 text with a header line; a byte order mark and CRLF line ends are accepted.

    Returns:
        The cases in the order of the lines.

    Raises:
        InputError: The file is missing, empty or not CSV, or lines are wrong; all are reported with their numbers.
        EnvironmentFault: The system refuses to read the file.
    """
    rows = tables.read_lines(path, "the manifest", "correct its path (dataset.manifest or --manifest)")
    if not rows:
        raise InputError("the manifest is empty", "give it a header 'slide_id,path' and a line per slide", path=path)
    dialects.require_truth_masks(rows[0].cells, path)
    columns = _columns(rows[0].cells, path)
    parsed = [_parsed(row, columns, path.parent.absolute()) for row in rows[1:]]
    problems = [problem for _, wrong in parsed for problem in wrong]
    if not parsed:
        problems.append(f"line {rows[0].number}: there is a header, but no line with a slide")
    named = [(values["slide_id"], f"line {values['line']}") for values, _ in parsed if "slide_id" in values]
    _report(problems + _collisions(named), "correct the manifest", path)
    return tuple(Case(**values) for values, _ in parsed)


def read_folder(folder: Path) -> tuple[Case, ...]:
    """Return the slides in a folder and its subfolders, which are recognised by their file extensions.

    A slide is named after its file. Several ``.dcm`` files in one folder are one slide, which is named after that
    folder, and its path is the first of them. A file of outlines with the name of the slide (``.xml``, ``.geojson``,
    ``.annotations``, ``.ndpa``), next to it or directly in ``folder``, is its annotation. Hidden files and folders are
    ignored. Anything else with the extension of a slide is taken for one, such as a broken link or a folder without a
    slide, and fails when it is opened. Links to folders are followed, but to each folder only once, and never to a
    folder that contains the link.

    Returns:
        The cases, sorted by path.

    Raises:
        InputError: The folder is missing or contains no slide, names collide or are unusable as slide ids, or a file
            occurs twice, which would count twice in the scores. All of these are reported together.
        EnvironmentFault: Folders cannot be listed; all of them are reported.
    """
    root = folder.absolute()
    slides = _without_siblings(_slides_below(root))
    if not slides:
        cause = f"the folder contains no slide ({' '.join(sorted(SLIDE_SUFFIXES))})"
        raise InputError(cause, "correct dataset.folder, or list the slides in a manifest", path=folder)
    names = [_slide_name(path) for path in slides]
    where = [path.relative_to(root).as_posix() for path in slides]
    problems = [f"{place}: {_id_problem(name)}" for name, place in zip(names, where, strict=True) if _id_problem(name)]
    problems += _collisions(zip(names, where, strict=True))
    _report(problems, "rename the files, or list them in a manifest with a column slide_id", folder)
    _report(_repeated(slides, where), "remove all but one, or list the slides in a manifest", folder)
    return tuple(
        Case(name, path, annotation_path=_companion(path, root)) for name, path in zip(names, slides, strict=True)
    )


def read_single(path: Path) -> tuple[Case, ...]:
    """Return one slide, which is named after its file (or after its folder, for one of several ``.dcm`` files).

    Returns:
        One case. The file need not exist; opening it would then fail.

    Raises:
        InputError: The name cannot be used as a slide id.
        EnvironmentFault: The folder of a ``.dcm`` file cannot be listed.
    """
    path = path.absolute()
    name = _slide_name(path)
    if bad := _id_problem(name):
        raise InputError(bad, "rename the file, or list it in a manifest with a column slide_id", path=path)
    return (Case(name, path, annotation_path=_companion(path, path.parent)),)


def _columns(header: Sequence[str], path: Path) -> list[str]:
    """Return the name in `COLUMNS` of every column of a header, or an empty text for a column to ignore."""
    known = {alias: column for column, aliases in COLUMNS.items() for alias in aliases}
    names = [cell.strip().lower() for cell in header]
    # CAMELYON's table of labels has both columns; its class is the size of the largest lesion, not a label.
    columns = ["" if name == "class" and "type" in names else known.get(name, "?") for name in names]
    problems = [_unknown(name, known) for name, column in zip(names, columns, strict=True) if column == "?"]
    for column in dict.fromkeys(columns):
        same = [name for name, meaning in zip(names, columns, strict=True) if meaning == column]
        if column not in {"", "?"} and len(same) > 1:
            problems.append(f"columns {', '.join(same)} all mean {column}")
    if not problems and "path" not in columns:
        problems.append("there is no column path")
    _report(problems, f"use the columns {','.join(COLUMNS)}", path)
    return columns


def _unknown(name: str, known: Iterable[str]) -> str:
    """Return the message about an unknown column, with a suggestion if its name is close to a known one."""
    if ";" in name or "\t" in name:
        return f"the header {name!r} is not separated by commas"
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"unknown column {name!r}" + (f" (did you mean {near[0]}?)" if near else "")


def _parsed(row: Line, columns: Sequence[str], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the values of a line by attribute of :class:`Case`, and messages about what is wrong with the line."""
    values: dict[str, Any] = {"line": row.number}
    if len(row.cells) != len(columns):
        return values, [f"line {row.number}: it has {len(row.cells)} cells, but the header has {len(columns)}"]
    wrong = []
    for column, cell in zip(columns, row.cells, strict=True):
        try:
            text = _safe_text(cell)
            if column and text:
                values[column] = _PARSERS[column](text, folder)
        except ValueError as error:
            wrong.append(f"line {row.number}: {column or 'class'}: {error}")
    if "path" not in values and not wrong:
        wrong.append(f"line {row.number}: the path is empty")
    if "slide_id" not in values and not wrong:
        values["slide_id"] = _slide_name(values["path"])
        if bad := _id_problem(values["slide_id"]):
            wrong.append(f"line {row.number}: {bad}; give it a slide_id")
    return values, wrong


def _safe_text(cell: str) -> str:
    """Return a cell without surrounding blanks; refuse formulas of spreadsheets and control characters.

    Raises:
        ValueError: A spreadsheet would execute the text, or it would break a line of a log.
    """
    if cell.startswith(_FORMULA_STARTS):
        raise ValueError(f"{cell!r} begins with {cell[0]!r}, which a spreadsheet takes for a formula")
    text = cell.strip()
    if any(unicodedata.category(letter) == "Cc" for letter in text):
        raise ValueError(f"{text!r} contains a control character")
    return text


def _slide_id(text: str, _folder: Path) -> str:
    if bad := _id_problem(text):
        raise ValueError(bad)
    return text


def _path(text: str, folder: Path) -> Path:
    return folder / text


def _existing_file(text: str, folder: Path) -> Path:
    path = folder / text
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except PermissionError as error:
        raise ValueError(f"{text!r} cannot be accessed ({error.strerror})") from error
    except OSError as error:
        if path.is_symlink():
            raise ValueError(f"{text!r} is a broken link ({path.readlink()})") from error
        is_file = False
    if not is_file:
        raise ValueError(f"{text!r} is not an existing file")
    return path


def _mpp(text: str, _folder: Path) -> float:
    try:
        mpp = float(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a number (write 0.25)") from error
    if not (math.isfinite(mpp) and mpp > 0):
        raise ValueError(f"{text!r} is not a positive number of micrometres per pixel")
    return mpp


def _label(text: str, _folder: Path) -> int:
    if text.lower() not in LABELS:
        raise ValueError(f"{text!r} is not one of {', '.join(LABELS)}")
    return LABELS[text.lower()]


def _sha256(text: str, _folder: Path) -> str:
    if not _SHA256.fullmatch(text.lower()):
        raise ValueError(f"{text!r} is not 64 hexadecimal digits")
    return text.lower()


def _any_text(text: str, _folder: Path) -> str:
    return text


_PARSERS: Mapping[str, Callable[[str, Path], object]] = {
    "slide_id": _slide_id,
    "path": _path,
    "mpp": _mpp,
    "label": _label,
    "annotation_path": _existing_file,
    "mask_path": _existing_file,
    "tissue_mask_path": _existing_file,
    "roi_path": _existing_file,
    "patient_id": _any_text,
    "split": _any_text,
    "scanner": _any_text,
    "sha256": _sha256,
}


def _id_problem(slide_id: str) -> str:
    """Return why a name cannot be a slide id, or an empty text if it can."""
    if _SLIDE_ID.fullmatch(slide_id):
        return ""
    allowed = "at most 100 ASCII letters, digits, '.', '_', '-' and blanks, the first a letter or digit"
    return f"the slide id {slide_id!r} is not {allowed}"


def _collisions(named: Iterable[tuple[str, str]]) -> list[str]:
    """Return a message for every slide id that repeats an earlier one, ignoring case.

    Args:
        named: Slide ids, each with its place, for example ``line 3``.
    """
    first: dict[str, tuple[str, str]] = {}
    problems = []
    for slide_id, where in named:
        earlier_id, earlier = first.setdefault(slide_id.casefold(), (slide_id, where))
        if earlier != where:
            problems.append(f"{where}: slide_id {slide_id!r} repeats {earlier_id!r} of {earlier}")
    return problems


def _report(problems: Sequence[str], remedy: str, path: Path) -> None:
    """Raise one InputError that lists all problems, if there are any."""
    if not problems:
        return
    count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
    raise InputError(f"{count}: {'; '.join(problems)}", remedy, path=path)


class _Tree(NamedTuple):
    """All files and folders below a folder that are not hidden.

    Attributes:
        files: Everything that is not a folder, and links to folders that are listed under another path.
        folders: Folders that were listed, including the topmost one.
        faults: Errors of the folders that could not be listed.
    """

    files: list[Path]
    folders: list[Path]
    faults: list[OSError]


def _tree(root: Path) -> _Tree:
    """Return the tree below a folder; links to folders are followed last, so that slides keep their real paths."""
    tree, seen, links = _Tree([], [], []), set[Path](), deque([root])
    while links:
        link = links.popleft()
        target = link.resolve()
        if target in seen or (link != root and link.parent.resolve().is_relative_to(target)):
            tree.files.append(link)
        else:
            links += _list(link, target, seen, tree)
    return tree


def _list(folder: Path, target: Path, seen: set[Path], tree: _Tree) -> list[Path]:
    """Add a folder and its subfolders, each real folder once, to the tree; return the links to folders among them."""
    links, waiting = [], [(folder, target)]
    while waiting:
        here, real = waiting.pop()
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(here) as listed:
                entries = sorted((one.name, one.is_symlink(), _is_folder(one)) for one in listed)
        except OSError as error:
            tree.faults.append(error)
            continue
        tree.folders.append(here)
        for name, is_link, is_folder in entries:
            if name.startswith("."):
                continue
            if not is_folder:
                tree.files.append(here / name)
            elif is_link:
                links.append(here / name)
            else:
                waiting.append((here / name, real / name))
    return links


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link to itself is not a folder
            raise
        return False


def _slides_below(root: Path) -> list[Path]:
    """Return all files with the extension of a slide, sorted, and folders with such a name that contain no slide.

    Raises:
        InputError: The folder does not exist, or is not a folder.
        EnvironmentFault: Folders cannot be listed.
    """
    tree = _tree(root)
    if not tree.folders and isinstance(tree.faults[0], FileNotFoundError | NotADirectoryError):
        if root.exists():
            raise InputError("the path is not a folder", "correct dataset.folder, or use dataset=single", path=root)
        raise InputError("the folder does not exist", "correct dataset.folder", path=root)
    if tree.faults:
        listing = ", ".join(f"{fault.filename} ({fault.strerror})" for fault in tree.faults)
        remedy = "check the permissions and the mount, or list the slides in a manifest"
        raise EnvironmentFault(f"folders cannot be listed: {listing}", remedy, path=root)
    files = [path for path in tree.files if path.suffix.lower() in SLIDE_SUFFIXES]
    parents = {parent for path in files for parent in path.parents}
    folders = [path for path in tree.folders[1:] if path.suffix.lower() in SLIDE_SUFFIXES and path not in parents]
    return sorted([*files, *folders])


def _repeated(slides: Sequence[Path], where: Sequence[str]) -> list[str]:
    """Return a message for every slide that is the same file as an earlier one, by a hard or a symbolic link."""
    first: dict[tuple[int, int, int, int], str] = {}
    problems = []
    for path, place in zip(slides, where, strict=True):
        try:
            status = path.stat()
        except OSError:
            continue  # opening it raises the error
        # Size and time are compared too, because inodes are not unique on every network file system.
        file = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        earlier = first.setdefault(file, place)
        if earlier != place:
            problems.append(f"{place} is the same file as {earlier}")
    return problems


def _is_dicom(path: Path) -> bool:
    # Path.is_dir would raise for a link that cannot be followed.
    return path.suffix.lower() == ".dcm" and not os.path.isdir(path)  # noqa: PTH112


def _without_siblings(paths: Sequence[Path]) -> list[Path]:
    """Return the paths with only the first DICOM file of every folder, since these files are one slide."""
    first: dict[Path, Path] = {}
    for path in paths:
        first.setdefault(path.parent if _is_dicom(path) else path, path)
    return list(first.values())


def _slide_name(path: Path) -> str:
    """Return the name of a slide: its file name without extension, or its folder's for one of several DICOM files."""
    if not (_is_dicom(path) and os.path.lexists(path)):
        return path.stem
    try:
        several = sum(map(_is_dicom, path.parent.iterdir())) > 1
    except OSError as error:
        raise content.unlisted(error) from error
    return path.parent.name if several else path.stem


def _companion(path: Path, root: Path) -> Path | None:
    """Return the annotation of a slide: a file of outlines with its name next to it or in ``root``; None without one.

    Anything with that name counts, even if it cannot be read: the slide must not be taken for one without annotation.
    """
    names = [f"{_slide_name(path)}{suffix}" for suffix in COMPANION_SUFFIXES] + [f"{path.name}.ndpa"]
    places = (place / name for place in (path.parent, root) for name in names)
    return next((place for place in places if os.path.lexists(place)), None)
