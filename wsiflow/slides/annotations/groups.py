"""What annotated outlines enclose: tumour, what is cut out of it, what is ignored, or nothing that counts.

An outline is known by its group, else by another text of it that names a known group, such as a title. Names are
compared without case and surrounding blanks.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import InputError
from wsiflow.slides.annotations import fill, formats
from wsiflow.slides.annotations.outlines import Drawing, NoArea, Origin, Outline, SlidePlace

Meaning = Literal["tumour", "normal", "ignore", "other"]
"""tumour: it is. normal: cut out of the tumour. ignore: neither hits nor false positives. other: counts for nothing."""

OVERHANG_PX = 64
"""How far a point may lie outside the slide without a word, level-0 px."""

_TUMOUR = "_0 _1 tumor tumour tumors tumours metastases metastasis metastase micrometastasis macrometastasis cancer"
_NORMAL = "_2 exclusion exclusions none normal benign healthy non-tumor non-tumour no-tumor no-tumour"
_IGNORE = "ignore ignore* ignored artefact artefacts artifact artifacts uncertain unsure"
_OTHER = "region region* regions roi rois tissue"

GROUPS: Mapping[str, Meaning] = {
    **dict.fromkeys((*_TUMOUR.split(), "carcinoma", "malignant", "lesion", "isolated tumor cells", "itc"), "tumour"),
    **dict.fromkeys(_NORMAL.split(), "normal"),
    **dict.fromkeys(_IGNORE.split(), "ignore"),
    **dict.fromkeys((*_OTHER.split(), "region of interest"), "other"),
}
"""The groups that are known without being named in ``evaluation.groups``, in lower case."""

_UNSTATED = {"", "none"}  # ASAP's default group is called None
_NAMED = 5  # in a message


@dataclass(frozen=True, eq=False)
class TruthOutlines:
    """The outlines of one slide by what they enclose, in level-0 px.

    Attributes:
        tumour: Outlines of tumour.
        exclusions: Outlines that are cut out of the tumour.
        ignored: Outlines of what takes neither hits nor false positives.
        without_area: Annotations that enclose nothing, such as accidental clicks (CAMELYON16 has one).
        remarks: Sentences for whoever reads the scores.
    """

    tumour: tuple[Outline, ...] = ()
    exclusions: tuple[Outline, ...] = ()
    ignored: tuple[Outline, ...] = ()
    without_area: tuple[NoArea, ...] = ()
    remarks: tuple[str, ...] = field(default=())

    @property
    def note(self) -> str:
        """All that readers of the scores should know of it; empty where there is nothing."""
        named = ", ".join(map(str, self.without_area[:_NAMED]))
        more = len(self.without_area) - _NAMED
        named += f" and {more} more" if more > 0 else ""
        return "; ".join((*([f"outlines without area: {named}"] if named else []), *self.remarks))


def read_outlines(
    path: Path,
    slide: SlidePlace | None = None,
    *,
    origin: Origin | None = None,
    groups: Mapping[str, Meaning] | None = None,
    label: int | None = None,
) -> TruthOutlines:
    """Read a file of annotations, and sort its outlines by what they enclose.

    Args:
        path: The file.
        slide: What is known of the slide; None for a slide without bounds.
        origin: See `formats.read`.
        groups: See `sort_outlines`.
        label: See `sort_outlines`.

    Raises:
        InputError: See `formats.read` and `sort_outlines`.
        EnvironmentFault: The system refuses to read the file.
    """
    drawing = formats.read(path, SlidePlace(l0_bounds_corner=(0, 0)) if slide is None else slide, origin=origin)
    return sort_outlines(drawing, path, groups=groups, label=label)


def sort_outlines(
    drawing: Drawing, path: Path, *, groups: Mapping[str, Meaning] | None = None, label: int | None = None
) -> TruthOutlines:
    """Sort the outlines of a file by what they enclose.

    Where no outline is known to be tumour or normal, the label decides: outlines without a group are tumour in a slide
    labelled tumour, and not in one labelled normal. Where some are, ASAP's default group ``None`` is cut out of the
    tumour, as in CAMELYON, and outlines of other formats without a class count for nothing.

    Args:
        drawing: The annotations of the file.
        path: The file, for messages.
        groups: What further groups enclose, by name; they come before `GROUPS`.
        label: Label of the slide: 1 for tumour, 0 for normal, None where it is not known.

    Raises:
        InputError: Groups are unknown; or nothing says what the slide is, and there is no label.
    """
    known = {**GROUPS, **{folded(name): meaning for name, meaning in (groups or {}).items()}}
    stated = {name: what for name, what in known.items() if name not in _UNSTATED or name in map(folded, groups or {})}
    found = [(one, meaning_of(one, stated)) for one in drawing.outlines]
    _require_known([one for one, meaning in found if meaning is None and folded(one.group) not in _UNSTATED], path)
    remarks = []
    fallback: dict[str, Meaning] = {"": "other", "none": "normal"}
    if not any(meaning in {"tumour", "normal"} for _, meaning in found):
        _require_label(drawing, label, path)
        fallback = dict.fromkeys(fallback, "tumour" if label else "normal")
        if label and any(meaning is None for _, meaning in found):
            remarks.append("outlines without a known group are taken for tumour, as the label says")
    sorted_by: dict[Meaning, list[Outline]] = {"tumour": [], "normal": [], "ignore": [], "other": []}
    for one, known_as in found:
        sorted_by[known_as or fallback[folded(one.group)]].append(one)
    if passed := sorted_by["other"]:
        remarks.append(f"outlines that count for nothing: {_names(passed)}")
    tumour, normal, ignored = (tuple(sorted_by[kind]) for kind in ("tumour", "normal", "ignore"))
    return TruthOutlines(tumour, normal, ignored, drawing.without_area, tuple(remarks))


def meaning_of(outline: Outline, known: Mapping[str, Meaning]) -> Meaning | None:
    """Return what an outline encloses, by its group or a text that names a known one; None where neither is known.

    An outline without a group is one of the group ``none`` as well, where nothing else says what it is.
    """
    texts = [*map(folded, (outline.group, *outline.hints)), "" if folded(outline.group) else "none"]
    return next((known[text] for text in texts if text in known), None)


def folded(name: str) -> str:
    """Return the name of a group as names are compared."""
    return name.strip().casefold()


def _require_label(drawing: Drawing, label: int | None, path: Path) -> None:
    """Refuse annotations none of which says whether the slide is tumour or normal, where no label says it either.

    Raises:
        InputError: There are such annotations, and there is no label.
    """
    if label is not None or not (drawing.outlines or drawing.without_area):
        return
    remedy = "say in the manifest whether the slide is tumour or normal (label)"
    if not drawing.outlines:
        shown = ", ".join(map(str, drawing.without_area[:_NAMED]))
        cause = f"all {len(drawing.without_area)} annotations enclose nothing ({shown})"
        raise InputError(f"{cause}, which does not say whether the slide is tumour", remedy, path=path)
    names, group = _names(list(drawing.outlines)), drawing.outlines[0].group
    verb = "outlines have" if len(drawing.outlines) > 1 else "the outline has"
    cause = (
        f"{names}: {verb} {f'the group {group!r}' if group else 'no group'}, which does not say whether it is tumour"
    )
    setting = f"'evaluation.groups={{{group or 'none'}: tumour}}'"
    raise InputError(cause, f"{remedy}, give the outlines a group, or set {setting}", path=path)


def _require_known(unknown: list[Outline], path: Path) -> None:
    """Refuse groups that are unknown: they could be tumour or not.

    Raises:
        InputError: There are some; all of them are named.
    """
    if not unknown:
        return
    counts = Counter(one.group for one in unknown)
    first = unknown[0].group
    cause = f"annotation {unknown[0].name!r} has the unknown group {first!r}"
    if len(unknown) > 1:
        listed = ", ".join(f"{group!r} ({count})" for group, count in counts.items())
        cause = f"{len(unknown)} annotations have unknown groups: {listed}"
    remedy = (
        f"say what it encloses: 'evaluation.groups={{{first}: ignore}}' (or tumour, normal, other; wsiflow evaluate: "
    )
    known = "known are tumor, metastases, normal, exclusion, ignore and the groups of CAMELYON"
    raise InputError(cause, f"{remedy}--group '{first}=ignore'), or rename it; {known}", path=path)


def check_on_slide(outlines: TruthOutlines, l0_size_px: tuple[int, int], path: Path) -> tuple[str, ...]:
    """Check that outlines belong to a slide of some width and height.

    Returns:
        Remarks on outlines that reach over its edge; they are cut off there.

    Raises:
        InputError: Of some outlines less than half lies on the slide; all of them are named.
    """
    every = (*outlines.tumour, *outlines.exclusions, *outlines.ignored)
    over = [(one, fill.share_on_slide(one, l0_size_px)) for one in every if _overhangs(one, l0_size_px)]
    lost = [one for one, share in over if share < 0.5]
    if lost:
        size = f"{l0_size_px[0]} x {l0_size_px[1]} px"
        x, y = lost[0].polygon[_outside(lost[0], l0_size_px, OVERHANG_PX)][0].tolist()
        cause = f"annotation {lost[0].name!r} has the point {x:g}, {y:g}, but the slide has {size}, and most of "
        cause += f"{'it lies' if len(lost) == 1 else f'{len(lost)} of {len(every)} annotations lies'} outside"
        raise InputError(cause, _remedy_of_place(every, l0_size_px), path=path)
    listed = ", ".join(f"{one.name!r} ({1 - share:.0%})" for one, share in over[:_NAMED])
    more = f" and {len(over) - _NAMED} more" if len(over) > _NAMED else ""
    return (f"outlines are cut off at the slide's edge: {listed}{more}",) if over else ()


def _remedy_of_place(every: tuple[Outline, ...], l0_size_px: tuple[int, int]) -> str:
    """Return what helps where outlines lie outside: x and y may be exchanged."""
    turned = l0_size_px[::-1]
    remedy = "give the annotation of this slide, in level-0 px"
    exchanged = not any(_overhangs(one, turned) for one in every)
    return f"{remedy} (with x and y exchanged all of them would lie on it)" if exchanged else remedy


def _overhangs(one: Outline, l0_size_px: tuple[int, int]) -> bool:
    return bool(_outside(one, l0_size_px, OVERHANG_PX).any())


def _outside(one: Outline, l0_size_px: tuple[int, int], margin_px: int) -> NDArray[np.bool_]:
    """Return which points of an outline lie farther than a margin outside the slide."""
    beyond: NDArray[np.bool_] = (one.polygon < -margin_px) | (one.polygon > np.array(l0_size_px) + margin_px)
    return np.asarray(beyond.any(axis=1))


def _names(outlines: list[Outline]) -> str:
    named = ", ".join(repr(one.name) for one in outlines[:_NAMED])
    return named + (f" and {len(outlines) - _NAMED} more" if len(outlines) > _NAMED else "")


def tumour_mask(outlines: TruthOutlines, shape: tuple[int, int], *, downsample: int = 32) -> NDArray[np.bool_]:
    """Return where a slide is tumour: inside an outline of tumour, and in none that is cut out or ignored.

    Args:
        outlines: The outlines of the slide.
        shape: Number of rows and columns of the mask.
        downsample: Level-0 px per mask px.

    Returns:
        bool (rows, cols), True where the centre of a pixel is tumour.
    """
    mask = fill.painted(outlines.tumour, shape, downsample=downsample)
    for cut in (outlines.exclusions, outlines.ignored):
        if cut and outlines.tumour:
            mask &= ~fill.painted(cut, shape, downsample=downsample)
    return mask
