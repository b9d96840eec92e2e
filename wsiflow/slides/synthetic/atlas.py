"""What slides like those of CAMELYON16 are made of: real outlines of tissue and metastases, and pictures of tissue.

Input: a data folder with ``camelyon16/`` (outlines, tables) and ``patches/`` (256 px pictures at 40x, PNG or JPEG in
folders ``normal`` and ``tumor``). Output: an `Atlas`.

Each picture and each outline belongs to the training or to the test part, by the slide its name tells, else by a hash
of its name. Pictures carry the colours of two scanners; their stains are taken apart, so that they can share new ones.
Points are x, y in level-0 px of the real slide.
"""

import hashlib
import json
import math
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsiflow.errors import InputError, WsiflowError
from wsiflow.slides.stain import density, transfer
from wsiflow.slides.stain.fits import DensityFit
from wsiflow.slides.stain.params import StainParams
from wsiflow.slides.synthetic import textures
from wsiflow.system import faults, tables

_ADVICE = "name a folder that has camelyon16/ and patches/ complete"

Part = Literal["train", "test"]

PATCH_FOLDERS = ("patches/camelyon16_256", "patches/dldp_256")
HELD_OUT_SLIDE = "tumor_073"
PATCH_PX = 256
LEAST_PICTURES = 8  # of a class and part
SCANNERS = ("0", "1")
_FILES = ("tissue_normal_json.tar.gz", "annotations_train_json.tar.gz", "tables/reference.csv")
_LEAST_TISSUE = 0.5  # part of a picture that must not be glass
_WHITE_GREY = 225


class Picture(NamedTuple):
    """A real picture of tissue.

    Attributes:
        name: Its file, relative to the data folder.
        tumour: Whether it shows tumour.
        part: What it may be used for.
        scanner: Which of the two it looks like: ``0`` brownish, ``1`` violet.
        codes: Amounts of its stains, see `wsiflow.slides.synthetic.textures`.
    """

    name: str
    tumour: bool
    part: Part
    scanner: str
    codes: textures.Codes


class Atlas(NamedTuple):
    """All that slides are made of.

    Attributes:
        pictures: Real tissue.
        stains: Haematoxylin and eosin of each scanner.
        sections: Outline of the largest section of each normal slide, level-0 px of the real slide.
        metastases: Outlines and islands of each tumour slide, likewise.
        centers: Center of each slide.
    """

    pictures: tuple[Picture, ...]
    stains: Mapping[str, DensityFit]
    sections: Mapping[str, NDArray[np.float64]]
    metastases: Mapping[str, tuple[tuple[NDArray[np.float64], ...], tuple[NDArray[np.float64], ...]]]
    centers: Mapping[str, str]


def part_of(name: str) -> Part:
    """Tell what a picture or an outline is for, by the name of its file without extension.

    Of the pictures that name their slide, one slide is for testing; of the others, and of outlines, a third by hash.
    """
    slide = re.match(r"(tumor|normal)_\d+_\d", name)
    if slide:
        return "test" if name.startswith(HELD_OUT_SLIDE) else "train"
    return "test" if hashlib.sha256(name.encode()).digest()[0] % 3 == 0 else "train"


@lru_cache(maxsize=1)
def read_atlas(data: Path) -> Atlas:
    """Read the data folder, some ten seconds; the trials of a sweep share what was read.

    Raises:
        InputError: Something is missing in it, or cannot be read.
    """
    tissue, tumour, table = (data / "camelyon16" / name for name in _FILES)
    for path in (tissue, tumour, table):
        if not path.is_file():
            raise _unusable(FileNotFoundError("it does not exist"), path)
    pictures, stains = _pictures(data)
    centers = _centers(table)
    sections = {slide: max(found["negative"], key=area) for slide, found in _outlines(tissue) if found["negative"]}
    metastases = {slide: (tuple(found["positive"]), tuple(found["negative"])) for slide, found in _outlines(tumour)}
    return Atlas(pictures, stains, sections, metastases, centers)


def _pictures(data: Path) -> tuple[tuple[Picture, ...], dict[str, DensityFit]]:
    """Return the pictures that hold enough tissue, with their stains taken apart, and the stains of each scanner."""
    paths = sorted(path for folder in PATCH_FOLDERS for path in (data / folder).glob("*/*.*"))
    read = [(path, pixels) for path in paths if (pixels := _pixels(path)) is not None]
    if not read:
        remedy = f"name the folder that has {PATCH_FOLDERS[0]}/normal and tumor"
        raise InputError("the folder holds no pictures of tissue", remedy, path=data)
    for tumour, part in product(("normal", "tumor"), ("train", "test")):
        n = sum(path.parent.name == tumour and part_of(path.stem) == part for path, _ in read)
        if n < LEAST_PICTURES:
            cause = f"{n} readable {tumour} pictures are for the {part} part, {LEAST_PICTURES} are needed"
            raise InputError(cause, "name a folder that has patches/ complete", path=data)
    hues = np.array([_hue(pixels) for _, pixels in read])
    border = _two_means(hues)
    scanners = [SCANNERS[int(hue > border)] for hue in hues]
    stains = {
        scanner: _fit_stains([pixels for (_, pixels), one in zip(read, scanners, strict=True) if one == scanner])
        for scanner in SCANNERS
    }
    found = [
        Picture(
            path.relative_to(data).as_posix(),
            path.parent.name == "tumor",
            part_of(path.stem),
            scanner,
            _codes(pixels, stains[scanner]),
        )
        for (path, pixels), scanner in zip(read, scanners, strict=True)
    ]
    return tuple(found), stains


def _pixels(path: Path) -> NDArray[np.uint8] | None:
    """Return a picture, or None where it is damaged, of another size, or mostly glass."""
    try:  # Pillow refuses a truncated file, where OpenCV would return the part that is there
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except OSError:
        return None
    if pixels.shape != (PATCH_PX, PATCH_PX, 3) or (pixels.min(axis=2) < _WHITE_GREY).mean() < _LEAST_TISSUE:
        return None
    return pixels


def _density(pixels: NDArray[np.uint8], white: float) -> NDArray[np.float64]:
    """Return optical densities, 3 x n, of pixels on a white ground."""
    of_grey = -np.log(np.clip(np.arange(256, dtype=np.float64), 1, white) / white)
    return np.asarray(of_grey[pixels.reshape(-1, 3).T], np.float64)


def _hue(pixels: NDArray[np.uint8]) -> float:
    """Return how violet a picture is: red optical density over blue, as a logarithm."""
    red, _, blue = _density(pixels, 245.0).mean(axis=1)
    return math.log((red + 0.01) / (blue + 0.01))


def _two_means(values: NDArray[np.float64]) -> float:
    """Return the border between two clusters of numbers (two-means, begun at the quartiles)."""
    low, high = np.quantile(values, [0.25, 0.75])
    for _ in range(50):
        border = (low + high) / 2
        low, high = values[values <= border].mean(), values[values > border].mean()
    return float((low + high) / 2)


def _fit_stains(pictures: list[NDArray[np.uint8]]) -> DensityFit:
    """Return the stains of all pictures of a scanner together, by Macenko's method."""
    params = StainParams.model_construct(  # not validated: a fit needs no target
        method="macenko",
        per_patch=False,
        on_failure="fail",
        sample_tiles=1,
        sample_px=200_000,
        min_tissue_px=1000,
        iterations=1,
        target=None,
    )
    found = transfer.fit(np.concatenate([pixels[::4, ::4].reshape(-1, 1, 3) for pixels in pictures]), params)
    if not isinstance(found, DensityFit):
        raise TypeError(type(found))
    return found


def _codes(pixels: NDArray[np.uint8], fit: DensityFit) -> textures.Codes:
    """Return the amounts of both stains in a picture."""
    amounts = density.stain_codes(_density(pixels, fit.white), np.array([fit.haematoxylin, fit.eosin]), 0.0)
    counts = np.clip(np.rint(amounts / textures.CODE_STEP), 0, 255).astype(np.uint8)
    return counts.T.reshape(*pixels.shape[:2], 2)


def _centers(table: Path) -> dict[str, str]:
    """Return the center of each slide of CAMELYON16."""
    rows = tables.read(table, "the table of centers", _ADVICE, ("image", "center")).rows()
    found = {row["image"].removesuffix(".tif"): row["center"] for row in rows}
    odd = sorted(set(found.values()) - set(SCANNERS))
    if odd:
        raise _unusable(ValueError(f"center {', '.join(odd)}, known are {', '.join(SCANNERS)}"), table)
    return found


def _outlines(archive: Path) -> Iterator[tuple[str, dict[str, list[NDArray[np.float64]]]]]:
    """Yield each slide of an archive of outlines, by name, with its polygons of both kinds."""
    try:
        with tarfile.open(archive) as opened:
            for member in sorted((one for one in opened if one.name.endswith(".json")), key=lambda one: one.name):
                stream = opened.extractfile(member)
                if stream is None:
                    continue
                values = json.load(stream)
                yield (
                    Path(member.name).stem.lower(),
                    {
                        kind: [
                            np.array(one["vertices"], np.float64) for one in values[kind] if len(one["vertices"]) > 2
                        ]
                        for kind in ("positive", "negative")
                    },
                )
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise _unusable(error, archive) from error


def _unusable(error: Exception, path: Path) -> WsiflowError:
    """Return the error of a file of the data folder."""
    if isinstance(error, OSError) and faults.number(error):
        return faults.unreadable(error, "it", _ADVICE, path=path)
    return InputError(f"it cannot be read ({type(error).__name__}: {error})", _ADVICE, path=path)


def area(outline: NDArray[np.float64]) -> float:
    """Return the area of a polygon."""
    return float(cv2.contourArea(outline.astype(np.float32)))
