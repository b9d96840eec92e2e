"""The slides of a run, read from a manifest, a folder or the path of a single slide.

Input: a CSV manifest, a folder of slides, or one slide. Output: a tuple of :class:`Case`, one per slide.

A manifest has the columns ``slide_id,path`` and any of ``mpp,label,annotation_path,mask_path,tissue_mask_path,roi_path,
patient_id,split,scanner,sha256``. Names that other tools use for these columns are accepted; further columns are kept,
to make subgroups of. Cells are separated by commas, semicolons or tabs. Paths are relative to the folder of the
manifest. All errors of a manifest are reported at once, with line numbers. A slide file that does not exist is not an
error of the manifest: only that slide fails, when it is opened.
"""

import math
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from wsiflow.errors import InputError
from wsiflow.slides import content, dialects, dicom, folder, names, typed_paths
from wsiflow.slides.annotations.outlines import COMPANION_SUFFIXES
from wsiflow.slides.kinds import FolderSlides, GivenSlides, ManifestSlides, SingleSlide
from wsiflow.slides.readers.formats import FOLDERS, SUFFIXES
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
    **dict.fromkeys(("0", "normal", "negative", "benign", "neg", "healthy", "false", "falsch", "no"), 0),
    **dict.fromkeys(("non-tumor", "non-tumour", "nontumor", "nontumour", "no tumor", "no tumour"), 0),
    **dict.fromkeys(("1", "tumor", "tumour", "positive", "metastasis", "micro", "macro"), 1),
    **dict.fromkeys(("pos", "malignant", "cancer", "carcinoma", "metastatic", "true", "wahr", "yes"), 1),
}
NO_VALUE = frozenset(
    {"n/a", "#n/a", "na", "n.a.", "nan", "<na>", "none", "null", "nil", "-", "--", "?", "unknown", "missing"}
)
"""What people and programs write, in any case, where they have no label, pixel size, patient or file."""
SLIDE_SUFFIXES = SUFFIXES | FOLDERS

_SEPARATORS = ",;\t"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ALWAYS_TEXT = frozenset({"slide_id", "path", "split", "scanner"})  # there, NA may be a name
_COUNTING = frozenset({"label", "annotation_path", "mask_path"})
_NUMBERS = frozenset({"mpp"})
_LONG_NAME, _SHORT_NAME = 10, 4  # of a column, letters
_SHOWN_SKIPPED = 20
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
        name: The slide's name as it was given, where that cannot be its id; else an empty text.
        columns: Name and text of each further column of the manifest.
        mpp_if_none: Micrometres per level-0 pixel where ``mpp`` is None and the slide states no plausible one, or None.
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
    name: str = ""
    columns: tuple[tuple[str, str], ...] = ()
    mpp_if_none: float | None = None
    tissue_mask_path: Path | None = None
    roi_path: Path | None = None


class Dataset(NamedTuple):
    """The slides of a run, and what is to be said of them before it begins.

    Attributes:
        cases: The slides.
        skipped: Why files that have the extension of a slide, or slides that are listed, are not among them.
        remarks: What else a user should know, a sentence each.
        n_beyond_limit: Number of slides that are left out by ``dataset.limit``.
    """

    cases: tuple[Case, ...]
    skipped: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    n_beyond_limit: int = 0

    def describe(self, source: Path) -> list[str]:
        """Return the first lines of a run: how many slides were found, which of them are skipped, and why.

        Args:
            source: The manifest, folder or file that they were found in.
        """
        n_skipped = len(self.skipped) + self.n_beyond_limit
        n_found = len(self.cases) + n_skipped
        but = f", {n_skipped} of them skipped" if n_skipped else ""
        listed = [f"skipped: {reason}" for reason in self.skipped[:_SHOWN_SKIPPED]]
        if len(self.skipped) > _SHOWN_SKIPPED:
            listed.append(f"skipped: {len(self.skipped) - _SHOWN_SKIPPED} more")
        if self.n_beyond_limit:
            listed.append(f"skipped: {self.n_beyond_limit} beyond dataset.limit={len(self.cases)}")
        return [f"slides     {n_found} found in {source}{but}", *listed, *self.remarks]


def load_dataset(params: GivenSlides) -> tuple[Case, ...]:
    """Return the slides that the settings name, at most ``limit`` of them; see `find_dataset`."""
    return find_dataset(params).cases


def find_dataset(params: GivenSlides) -> Dataset:
    """Return the slides that the settings name, at most ``limit`` of them, and what is to be said of them.

    Raises:
        InputError: The manifest, folder or file that the settings name is unusable.
        EnvironmentFault: The system refuses to read it.
    """
    if isinstance(params, ManifestSlides):
        found = _listed_in_manifest(params.manifest)
    elif isinstance(params, FolderSlides):
        found = _found_in_folder(params.folder)
    else:
        found = Dataset(read_single(params.path))
    cases = tuple(_with_mpp(case, params) for case in found.cases[: params.limit])
    return found._replace(cases=cases, n_beyond_limit=len(found.cases) - len(cases))


def _with_mpp(case: Case, params: GivenSlides) -> Case:
    """Return a case with the pixel size of the settings: in any case of a single slide, else where it has none."""
    if params.mpp is None or case.mpp is not None:
        return case
    is_single = isinstance(params, SingleSlide)
    return replace(case, mpp=params.mpp) if is_single else replace(case, mpp_if_none=params.mpp)


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
    return _listed_in_manifest(path).cases


def read_columns(path: Path) -> dict[str, dict[str, str]]:
    """Return the text of every named column of a manifest as it is written, by the column's name and slide id.

    Raises:
        InputError: See `read_manifest`.
        EnvironmentFault: See `read_manifest`.
    """
    header, *rows = _lines(path)
    slide_ids = {case.line: case.slide_id for case in read_manifest(path)}
    places = {cell.strip().lower(): place for place, cell in enumerate(header.cells) if cell.strip()}
    return {
        name: {slide_ids[row.number]: row.cells[place].strip() for row in rows if row.number in slide_ids}
        for name, place in places.items()
    }


def _lines(path: Path) -> list[Line]:
    remedy = "correct its path (dataset.manifest or --manifest)"
    lines = tables.read_lines(path, "the manifest", remedy, _SEPARATORS)
    if not lines:
        raise InputError("the manifest is empty", "give it a header 'slide_id,path' and a line per slide", path=path)
    return lines


def _listed_in_manifest(path: Path) -> Dataset:
    """Return the slides that a manifest lists, and what is to be said of them; see `read_manifest`."""
    header, *rows = _lines(path)
    dialects.require_truth_masks(header.cells, path)
    columns = _columns(header.cells, path)
    parsed = [_parsed(row, columns, path.parent.absolute()) for row in rows]
    problems = [problem for _, wrong in parsed for problem in wrong] + _unnamed(rows, columns)
    if not parsed:
        problems.append(f"line {header.number}: there is a header, but no line with a slide")
    values = [values for values, _ in parsed]
    _name_by_files([each for each in values if "slide_id" not in each and "path" in each], values)
    problems += _collisions((each["slide_id"], f"line {each['line']}") for each in values if "slide_id" in each)
    twice, doubled = _files_listed_twice([each for each in values if "path" in each])
    _report(problems + twice, "correct the manifest", path)
    further = ", ".join(dict.fromkeys(column.name for column in columns if column.name and not column.meaning))
    remarks = [f"further columns of the manifest are kept, for --subgroups: {further}"] if further else []
    return Dataset(tuple(Case(**each) for each in values), remarks=(*remarks, *doubled))


def read_folder(path: Path) -> tuple[Case, ...]:
    """Return the slides in a folder and its subfolders, which are recognised by their file extensions.

    A slide is named after its file, and slides whose files have one name after their folders too. The ``.dcm`` files of
    a series are one slide, whose path is the first of them; it is named after that file, or where the folder has no
    other slide after the folder. A file of outlines with the name of the slide (``.xml``, ``.geojson``,
    ``.annotations``, ``.ndpa``), next to it or directly in ``path``, is its annotation. Hidden files and folders are
    ignored, and so are masks and other pictures of slides, which are known by their names. Anything else with the
    extension of a slide is taken for one, such as a broken link or a folder without a slide, and fails when it is
    opened. Links to folders are followed, but to each folder only once, and never to a folder that contains the link.

    Returns:
        The cases, sorted by path.

    Raises:
        InputError: The folder is missing or contains no slide, or a file occurs twice, which would count twice in the
            scores.
        EnvironmentFault: Folders cannot be listed; all of them are reported.
    """
    return _found_in_folder(path).cases


def _found_in_folder(path: Path) -> Dataset:
    """Return the slides in a folder, and what is to be said of its other files; see `read_folder`."""
    root = path.absolute()
    found = folder.survey(root, SLIDE_SUFFIXES)
    others = folder.describe_others(found.others)
    if not found.slides:
        cause = f"the folder contains no slide ({' '.join(sorted(SLIDE_SUFFIXES))})"
        cause += f"; {others}" if others else ""
        raise InputError(cause, "correct dataset.folder, or list the slides in a manifest", path=path)
    places = [slide.relative_to(root) for slide in found.slides]
    where = [place.as_posix() for place in places]
    _report(_repeated(found.slides, where), "remove all but one, or list one of them in a manifest", path)
    stems = [_slide_name(slide) for slide in found.slides]
    alike = {path for slides in _of_one_name(found.slides, stems) for path in slides}
    cases = []
    for slide, name in zip(found.slides, names.distinct_names(places, stems), strict=True):
        annotation = _companion(slide, slide.parent if slide in alike else root)
        cases.append(Case(**_named(name), path=slide, annotation_path=annotation))
    used = {case.annotation_path for case in cases}
    of_files = (slide for slide in found.slides if slide.suffix.lower() != dicom.SUFFIX)
    used |= {part for slide in of_files for part in content.companions(slide)}
    remarks = [folder.describe_others([one for one in found.others if one not in used])]
    remarks += _ambiguities(root, _of_one_name(found.slides, stems))
    remarks += [f"the link {link.relative_to(root)} leads nowhere ({link.readlink()})" for link in found.broken]
    if any(skipped.is_picture for skipped in found.skipped):
        remarks.append("a mask is used where a manifest names it: mask_path is tumour, tissue_mask_path is tissue")
    skipped = tuple(f"{one.place}: {one.reason}" for one in found.skipped)
    return Dataset(tuple(cases), skipped, tuple(filter(None, remarks)))


def _of_one_name(slides: Sequence[Path], stems: Sequence[str]) -> list[list[Path]]:
    """Return the slides whose files have one name, ignoring case, for every such name."""
    by_name: dict[str, list[Path]] = {}
    for slide, stem in zip(slides, stems, strict=True):
        by_name.setdefault(names.folded(stem), []).append(slide)
    return [group for group in by_name.values() if len(group) > 1]


def _ambiguities(root: Path, groups: Iterable[Sequence[Path]]) -> list[str]:
    """Return what is not clear about slides whose files have one name: whether they are one, and whose truth it is."""
    remarks = []
    for group in groups:
        listed = ", ".join(slide.relative_to(root).as_posix() for slide in group)
        if len({slide.parent for slide in group}) < len(group):
            remarks.append(f"{listed}: if files of one name are one slide, remove all but one, or it counts twice")
        on_top = _companion(root / group[0].name, root)
        if on_top is not None and all(slide.parent != root for slide in group):
            remarks.append(f"{on_top.name} may belong to each of {listed}, and is not used: put it beside its slide")
    return remarks


def _named(name: str) -> dict[str, Any]:
    """Return the id of a slide, and its name where that is another, by attribute of :class:`Case`."""
    slide_id = names.slide_id(name)
    return {"slide_id": slide_id} if slide_id == name else {"slide_id": slide_id, "name": name}


def read_single(path: Path) -> tuple[Case, ...]:
    """Return one slide, which is named after its file (or after its folder, for one of several ``.dcm`` files).

    Returns:
        One case. The file need not exist; opening it would then fail.

    Raises:
        EnvironmentFault: The folder of a ``.dcm`` file cannot be listed.
    """
    path = path.absolute()
    return (Case(**_named(_slide_name(path)), path=path, annotation_path=_companion(path, path.parent)),)


class _Column(NamedTuple):
    """A column of a manifest: its name, and the name in `COLUMNS` of what it means, or an empty text."""

    name: str
    meaning: str


def _columns(header: Sequence[str], path: Path) -> list[_Column]:
    """Return the columns of a manifest.

    Raises:
        InputError: There is no path, several columns mean the same, or the name of one is probably misspelt.
    """
    known = {alias: column for column, aliases in COLUMNS.items() for alias in aliases}
    written = [cell.strip().lower() for cell in header]
    plain = [re.sub(r"[\s-]+", "_", name) for name in written]
    # CAMELYON's table of labels has both columns; its class is the size of the largest lesion, not a label.
    meanings = ["" if name == "class" and "type" in plain else known.get(name, "") for name in plain]
    columns = [_Column(*each) for each in zip(written, meanings, strict=True)]
    problems = [
        f"unknown column {column.name!r} (did you mean {near}?)"
        for column, name in zip(columns, plain, strict=True)
        if not column.meaning and (near := _misspelt(name, known, meanings))
    ]
    for key in dict.fromkeys(column.meaning or column.name for column in columns):
        same = [column.name for column in columns if key and key == (column.meaning or column.name)]
        if len(same) > 1:
            problems.append(f"columns {', '.join(same)} all mean {key}")
    if not problems and "path" not in meanings:
        problems.append(f"there is no column path, the first line is {','.join(header)!r}")
    _report(problems, f"give it a header with these names (others are kept as they are): {','.join(COLUMNS)}", path)
    return columns


def _misspelt(name: str, known: Mapping[str, str], meanings: Sequence[str]) -> str:
    """Return the known name that an unknown one is a slip of the pen away from; empty where there is none.

    A column is not suspected where the manifest has another with that meaning.
    """
    slips = 2 if len(name) >= _LONG_NAME else 1
    near = (alias for alias, meaning in known.items() if meaning not in meanings and len(alias) >= _SHORT_NAME)
    return next((alias for alias in near if _slips(name, alias) <= slips), "") if len(name) >= _SHORT_NAME else ""


def _slips(a: str, b: str) -> int:
    """Return how many letters must be inserted, left out, replaced or swapped with their neighbour to turn a into b."""
    rows = [list(range(len(b) + 1))]
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            row.append(min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (letter != other)))
            if min(i, j) > 1 and letter == b[j - 2] and a[i - 2] == other:
                row[-1] = min(row[-1], rows[-2][j - 2] + 1)
        rows.append(row)
    return rows[-1][-1]


def _unnamed(rows: Sequence[Line], columns: Sequence[_Column]) -> list[str]:
    """Return a message for every column without a name that holds something, with its first line.

    The numbers of the lines, which programs write in front, are passed over.
    """
    problems = []
    for place, column in enumerate(columns):
        filled = [row for row in rows if not column.name and len(row.cells) > place and row.cells[place].strip()]
        if filled and (place or not all(row.cells[0].strip().isdecimal() for row in filled)):
            cell = filled[0].cells[place].strip()
            problems.append(f"line {filled[0].number}: column {place + 1} has {cell!r} here, but no name in the header")
    return problems


def _parsed(row: Line, columns: Sequence[_Column], place: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the values of a line by attribute of :class:`Case`, and messages about what is wrong with the line."""
    values: dict[str, Any] = {"line": row.number}
    n_named = max(number for number, column in enumerate(columns, 1) if column.name)
    if len(row.cells) < n_named or any(cell.strip() for cell in row.cells[len(columns) :]):
        return values, [f"line {row.number}: it has {len(row.cells)} cells, but the header has {len(columns)}"]
    wrong, further = [], []
    for column, cell in zip(columns, row.cells, strict=False):  # unnamed columns at the end may be missing
        try:
            if column.meaning:
                values |= _value(column.meaning, cell, place)
            elif column.name:
                further.append((column.name, _text_or_number(cell)))
        except ValueError as error:
            wrong.append(f"line {row.number}: {column.meaning or column.name}: {error}")
    if further:
        values["columns"] = tuple(further)
    if "path" not in values and not wrong:
        wrong.append(f"line {row.number}: the path is empty")
    return values, wrong


def _value(meaning: str, cell: str, place: Path) -> dict[str, Any]:
    """Return what a cell says, by attribute of :class:`Case`; nothing where it is empty, or says that it is not known.

    Raises:
        ValueError: The text is not acceptable.
    """
    if meaning not in _ALWAYS_TEXT and cell.strip().lower() in NO_VALUE:
        return {}
    text = _text_or_number(cell) if meaning in _NUMBERS else _safe_text(cell)
    if meaning == "slide_id":
        return _named(text) if text else {}
    return {meaning: _PARSERS[meaning](text, place)} if text else {}


def _name_by_files(unnamed: Sequence[dict[str, Any]], values: Sequence[Mapping[str, Any]]) -> None:
    """Name slides without an id after their files, and those whose files have one name after their folders too."""
    if not unnamed:
        return
    taken = [each["slide_id"] for each in values if "slide_id" in each]
    paths = [Path(os.path.normpath(each["path"])) for each in unnamed]
    root = os.path.commonpath([path.parent for path in paths])
    places = [PurePath(path.relative_to(root)) for path in paths]
    unique = names.distinct_names(places, [_slide_name(each["path"]) for each in unnamed], taken)
    for each, name in zip(unnamed, unique, strict=True):
        each |= _named(name)


def _files_listed_twice(values: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Return what is wrong with slides that are one file, and what is only to be said of them.

    Slides with a label or with truth would count twice in the scores; others only cost time.
    """
    first: dict[object, Mapping[str, Any]] = {}
    wrong: list[str] = []
    remarks: list[str] = []
    for each in values:
        file = _file_id(each["path"])
        earlier = each if file is None else first.setdefault(file, each)
        if earlier is not each:
            cause = f"line {each['line']}: {each['path'].name} is the same file as in line {earlier['line']}"
            is_scored = all(_COUNTING & one.keys() for one in (each, earlier))
            (wrong if is_scored else remarks).append(cause + (", and would count twice" if is_scored else ""))
    return wrong, remarks


def _file_id(path: Path) -> object:
    """Return what tells a slide's file from all others, however its path is spelled; None where it cannot be known."""
    try:
        first = dicom.first_of_series(path) if dicom.is_named_like_one(path) else path
        status = first.stat()
    except OSError:
        return None  # opening it raises the error
    # Size and time are compared too, because inodes are not unique on every network file system.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


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


def _text_or_number(cell: str) -> str:
    """Return a cell without surrounding blanks; signs and numbers are not refused as formulas here."""
    text = cell.strip()
    return text if re.fullmatch(r"[+-]*[\d.,]*", text) else _safe_text(cell)


def _path(text: str, place: Path) -> Path:
    if text.lower() in NO_VALUE and not os.path.lexists(place / text):
        raise ValueError(f"{text!r} is no path")
    return typed_paths.located(text, place)


def _existing_file(text: str, place: Path) -> Path:
    path = typed_paths.located(text, place)
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except PermissionError as error:
        raise ValueError(f"{text!r} cannot be accessed ({error.strerror})") from error
    except OSError as error:
        if os.path.islink(path):  # noqa: PTH114 - Path.is_symlink raises for a name that is too long
            raise ValueError(f"{text!r} is a broken link ({path.readlink()})") from error
        is_file = False
    if not is_file:
        raise ValueError(f"{text!r} is not an existing file")
    return path


def _mpp(text: str, _place: Path) -> float:
    try:
        mpp = float(re.sub(r"^(\d*),(\d+)$", r"\1.\2", text))
    except ValueError as error:
        raise ValueError(f"{text!r} is not a number (write 0.25)") from error
    if not (math.isfinite(mpp) and mpp > 0):
        raise ValueError(f"{text!r} is not a positive number of micrometres per pixel")
    return mpp


def _label(text: str, _place: Path) -> int:
    whole = re.sub(r"^([01])[.,]0+$", r"\1", text.lower())  # programs write 1.0 where the column has empty cells
    if whole not in LABELS:
        raise ValueError(f"{text!r} is not one of {', '.join(LABELS)}; where it is not known, leave the cell empty")
    return LABELS[whole]


def _sha256(text: str, _place: Path) -> str:
    if not _SHA256.fullmatch(text.lower()):
        raise ValueError(f"{text!r} is not 64 hexadecimal digits")
    return text.lower()


def _any_text(text: str, _place: Path) -> str:
    return text


_PARSERS: Mapping[str, Callable[[str, Path], object]] = {
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


def _repeated(slides: Sequence[Path], where: Sequence[str]) -> list[str]:
    """Return a message for every slide that is the same file as an earlier one, by a hard or a symbolic link."""
    first: dict[object, str] = {}
    problems = []
    for path, place in zip(slides, where, strict=True):
        file = _file_id(path)
        earlier = place if file is None else first.setdefault(file, place)
        if earlier != place:
            problems.append(f"{place} is the same file as {earlier}")
    return problems


def _slide_name(path: Path) -> str:
    """Return the name of a slide: its file name without extension, or for one of several DICOM files their name."""
    if not (dicom.is_named_like_one(path) and os.path.lexists(path)):
        return path.stem
    try:
        return dicom.name_of_slide(path)
    except OSError as error:
        raise content.unlisted(error) from error


def _companion(path: Path, root: Path) -> Path | None:
    """Return the annotation of a slide: a file of outlines with its name next to it or in ``root``; None without one.

    Anything with that name counts, even if it cannot be read: the slide must not be taken for one without annotation.
    """
    names = [f"{_slide_name(path)}{suffix}" for suffix in COMPANION_SUFFIXES] + [f"{path.name}.ndpa"]
    places = (place / name for place in (path.parent, root) for name in names)
    return next((place for place in places if os.path.lexists(place)), None)
