"""What a folder and its subfolders hold: slides, files that only look like slides, and everything else.

Input: a folder. Output: paths. No file is opened except the headers of DICOM files, which tell their series apart.
"""

import errno
import os
import re
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.slides import dicom
from wsiflow.slides.names import folded
from wsiflow.system import faults

# A picture named after a slide with one of these words anywhere behind is drawn from the slide.
_MASK_WORDS = frozenset({"mask", "masks", "segmentation", "groundtruth"})
# With one of these, and nothing else behind the name of the slide.
_DERIVED_WORDS = _MASK_WORDS | {
    *("gt", "seg", "tissue", "truth", "label", "labels", "labelmap", "annotation", "annotations"),
    *("heatmap", "overlay", "overview", "preview", "thumb", "thumbnail", "macro"),
}
_MASK_FOLDERS = frozenset(
    {"mask", "masks", "tissue", "tissuemasks", "groundtruth", "gt", "segmentations", "annotations", "labels"}
)
_SEPARATORS = re.compile(r"[ ._-]+")
_WHOLE_FOLDERS = frozenset({".zarr"})  # one image in a folder: its files are no slides
_NAMED_KINDS = 8


class Skipped(NamedTuple):
    """A file that has the extension of a slide and is none: its place in the folder, the reason, and its kind.

    Attributes:
        is_picture: Whether it is a mask or another picture of a slide.
    """

    place: str
    reason: str
    is_picture: bool


class Survey(NamedTuple):
    """What a folder holds.

    Attributes:
        slides: Path of each slide, sorted; of DICOM the first file of each series.
        skipped: Files with the extension of a slide that are none.
        others: All other files.
        broken: Links that lead nowhere, and are not named like a slide.
    """

    slides: list[Path]
    skipped: list[Skipped]
    others: list[Path]
    broken: list[Path]


def survey(root: Path, suffixes: Collection[str]) -> Survey:
    """Search a folder and its subfolders for slides; links to folders are followed, to each folder once.

    Args:
        root: The folder.
        suffixes: Extensions of slides, in lower case with their dot.

    Raises:
        InputError: The folder does not exist, or is not a folder.
        EnvironmentFault: Folders cannot be listed; the slides in them would be left out silently.
    """
    tree = _tree(root)
    _check_listed(root, tree)
    files = [path for path in tree.files if _is_like_a_slide(path, suffixes)]
    _check_names(root, files)
    parents = {parent for path in files for parent in path.parents}
    folders = [path for path in tree.folders[1:] if path.suffix.lower() in suffixes and path not in parents]
    alike = set(files)
    rest = [path for path in tree.files if path not in alike]
    broken = [path for path in rest if path.is_symlink() and not os.path.exists(path)]  # noqa: PTH110 - may not raise
    slides, of_other_kinds = _one_of_each_series(sorted([*files, *folders]))
    masks = _masks(root, slides)
    reasons = {**of_other_kinds, **masks}
    skipped = [Skipped(path.relative_to(root).as_posix(), reason, path in masks) for path, reason in reasons.items()]
    lost = set(broken)
    return Survey(
        [path for path in slides if path not in masks],
        sorted(skipped),
        [path for path in rest if path not in lost],
        broken,
    )


def describe_others(others: Sequence[Path]) -> str:
    """Return in words which files were passed over, by their extensions; empty where there are none."""
    if not others:
        return ""
    kinds = Counter(path.suffix.lower() or "without an extension" for path in others)
    listed = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
    shown = ", ".join(f"{kind} {count}" for kind, count in listed[:_NAMED_KINDS])
    more = f", {len(listed) - _NAMED_KINDS} more kinds" if len(listed) > _NAMED_KINDS else ""
    return f"{len(others)} {'file' if len(others) == 1 else 'files'} passed over ({shown}{more})"


def _check_listed(root: Path, tree: "_Tree") -> None:
    if not tree.folders and isinstance(tree.faults[0], FileNotFoundError | NotADirectoryError):
        if root.exists():
            raise InputError("the path is not a folder", "correct dataset.folder, or use dataset=single", path=root)
        raise InputError("the folder does not exist", "correct dataset.folder", path=root)
    if tree.faults:
        listing = ", ".join(f"{fault.filename} ({fault.strerror})" for fault in tree.faults)
        remedy = "check the permissions and the mount, or list the slides in a manifest"
        raise EnvironmentFault(f"folders cannot be listed: {listing}", remedy, path=root)


def _check_names(root: Path, files: Sequence[Path]) -> None:
    """Refuse names whose bytes are no text, such as those of a disk that was written in another encoding."""
    unreadable = [path.name for path in files if faults.as_text(str(path)) != str(path)]
    if unreadable:
        named = ", ".join(map(faults.as_text, unreadable[:_NAMED_KINDS]))
        cause = f"the names of {len(unreadable)} slides are no UTF-8 text ({named})"
        raise InputError(cause, "rename them, for example with convmv", path=root)


# --- all files


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
            if not is_folder or Path(name).suffix.lower() in _WHOLE_FOLDERS:
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


def _is_like_a_slide(path: Path, suffixes: Collection[str]) -> bool:
    """Tell whether a file has the extension of a slide, or is a link that leads nowhere and had one at its end."""
    if path.suffix.lower() in suffixes:
        return True
    if not path.is_symlink() or os.path.exists(path):  # noqa: PTH110 - Path.exists may raise
        return False
    return path.readlink().suffix.lower() in suffixes


# --- files that are no slide of their own


def _one_of_each_series(paths: Sequence[Path]) -> tuple[list[Path], dict[Path, str]]:
    """Return the paths with the first DICOM file of each series alone, and why other DICOM files are no slides."""
    series: dict[tuple[Path, str], list[Path]] = {}
    for path in paths:
        series.setdefault(_series_key(path), []).append(path)
    slides: list[Path] = []
    others: dict[Path, str] = {}
    for files in series.values():
        if not dicom.is_named_like_one(files[0]) or any(map(dicom.is_of_slide, files)):
            slides.append(files[0])
        else:
            others |= dict.fromkeys(files, "DICOM of another class than images of slides")
    return sorted(slides), others


def _series_key(path: Path) -> tuple[Path, str]:
    if not dicom.is_named_like_one(path):
        return path, ""
    header = dicom.read_header(path)
    return path.parent, header.series if header else ""


def _masks(root: Path, slides: Sequence[Path]) -> dict[Path, str]:
    """Return why slides are only pictures that were drawn from others by their names, such as masks, by path."""
    by_stem: dict[str, list[Path]] = {}
    for path in slides:
        by_stem.setdefault(_stem(path), []).append(path)
    reasons = {}
    for path in slides:
        origin = next(_origins(root, path, by_stem), None)
        if origin is not None:
            reasons[path] = f"named like a mask or another picture of {origin.relative_to(root).as_posix()}"
    return reasons


def _stem(path: Path) -> str:
    stem = folded(path.stem)
    return stem.removesuffix(".ome")


def _origins(root: Path, path: Path, by_stem: Mapping[str, Iterable[Path]]) -> Iterator[Path]:
    """Yield the slides of which a path is named as a picture."""
    stem = _stem(path)
    for cut in _SEPARATORS.finditer(stem):
        before, behind = stem[: cut.start()], _SEPARATORS.split(stem[cut.end() :])
        if not _MASK_WORDS.isdisjoint(behind):
            yield from by_stem.get(before, ())
        elif "".join(behind) in _DERIVED_WORDS:
            yield from (one for one in by_stem.get(before, ()) if one.parent == path.parent)
        if before in _MASK_WORDS:
            yield from by_stem.get(stem[cut.end() :], ())
    if _is_in_mask_folder(root, path):
        yield from (one for one in by_stem[stem] if not _is_in_mask_folder(root, one))


def _is_in_mask_folder(root: Path, path: Path) -> bool:
    parts = path.relative_to(root).parts[:-1]
    return any(_SEPARATORS.sub("", folded(part)) in _MASK_FOLDERS for part in parts)
