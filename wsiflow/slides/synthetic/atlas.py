"""The material of synthetic slides like those of CAMELYON16: real outlines of tissue and metastases, and tissue images.

Input: a data folder with ``camelyon16/`` (outlines, tables) and ``patches/`` (images of 256 px at 40x, PNG or JPEG, in
the folders ``normal`` and ``tumor``). Output: an `Atlas`.

Each image and each outline belongs to the training or the test part, by the slide in its name, or else by a hash of its
name. The images have the colours of two scanners. Their stains are separated, so that all can be shown in new stains.
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

_ADVICE = "name a folder that contains camelyon16/ and patches/ completely"

Part = Literal["train", "test"]

PATCH_FOLDERS = ("patches/camelyon16_256", "patches/dldp_256")
HELD_OUT_SLIDE = "tumor_073"
PATCH_PX = 256
LEAST_PICTURES = 8  # minimum for each class and part
SCANNERS = ("0", "1")
_FILES = ("tissue_normal_json.tar.gz", "annotations_train_json.tar.gz", "tables/reference.csv")
_LEAST_TISSUE = 0.5  # fraction of an image that must not be glass
_WHITE_GREY = 225


class Picture(NamedTuple):
    """A real image of tissue.

    Attributes:
        name: Path of its file, relative to the data folder.
        tumour: Whether it shows tumour.
        part: The part of the data in which it may be used.
        scanner: The scanner whose colours it has: ``0`` brownish, ``1`` violet.
        codes: Amounts of its stains, uint8 (rows, cols, 2), see `wsiflow.slides.synthetic.textures`.
    """

    name: str
    tumour: bool
    part: Part
    scanner: str
    codes: textures.Codes


class Atlas(NamedTuple):
    """The material of synthetic slides.

    Attributes:
        pictures: Real images of tissue.
        stains: The colours of haematoxylin and eosin of each scanner.
        sections: Outline of the largest tissue section of each normal slide, by the name of the slide.
        metastases: Outlines of metastases, and of islands of normal tissue in them, of each tumour slide.
        centers: The CAMELYON16 center of each slide, which is also its scanner.
    """

    pictures: tuple[Picture, ...]
    stains: Mapping[str, DensityFit]
    sections: Mapping[str, NDArray[np.float64]]
    metastases: Mapping[str, tuple[tuple[NDArray[np.float64], ...], tuple[NDArray[np.float64], ...]]]
    centers: Mapping[str, str]


def part_of(name: str) -> Part:
    """Return the part, train or test, to which an image or an outline belongs.

    Images that name their slide are for testing if the slide is `HELD_OUT_SLIDE`. Of all other images, and of outlines,
    a third is for testing, chosen by a hash of the name.

    Args:
        name: Name of the file without extension.
    """
    slide = re.match(r"(tumor|normal)_\d+_\d", name)
    if slide:
        return "test" if name.startswith(HELD_OUT_SLIDE) else "train"
    return "test" if hashlib.sha256(name.encode()).digest()[0] % 3 == 0 else "train"


@lru_cache(maxsize=1)
def read_atlas(data: Path) -> Atlas:
    """Read the data folder, which takes seconds; the result is cached, so the trials of a sweep share it.

    Raises:
        InputError: A file is missing or damaged, or there are too few images.
        EnvironmentFault: The system refuses to read a file.
    """
    tissue, tumour, table = (data / "camelyon16" / name for name in _FILES)
    for path in (tissue, tumour, table):
        if not path.is_file():
            raise _unusable(FileNotFoundError("it does not exist"), path)
    pictures, stains = _pictures(data)
    centers = _centers(table)
    sections = {slide: max(kinds["negative"], key=area) for slide, kinds in _outlines(tissue) if kinds["negative"]}
    metastases = {slide: (tuple(kinds["positive"]), tuple(kinds["negative"])) for slide, kinds in _outlines(tumour)}
    return Atlas(pictures, stains, sections, metastases, centers)


def _pictures(data: Path) -> tuple[tuple[Picture, ...], dict[str, DensityFit]]:
    """Return the images with enough tissue, their stains separated, and the stains of each scanner."""
    paths = sorted(path for folder in PATCH_FOLDERS for path in (data / folder).glob("*/*.*"))
    read = [(path, pixels) for path in paths if (pixels := _pixels(path)) is not None]
    if not read:
        remedy = f"name the folder that contains {PATCH_FOLDERS[0]}/normal and tumor"
        raise InputError("the folder contains no images of tissue", remedy, path=data)
    for tumour, part in product(("normal", "tumor"), ("train", "test")):
        n = sum(path.parent.name == tumour and part_of(path.stem) == part for path, _ in read)
        if n < LEAST_PICTURES:
            cause = f"the {part} part has {n} readable {tumour} images, but needs {LEAST_PICTURES}"
            raise InputError(cause, "name a folder that contains patches/ completely", path=data)
    hues = np.array([_hue(pixels) for _, pixels in read])
    border = _two_means(hues)
    scanners = [SCANNERS[int(hue > border)] for hue in hues]
    stains = {
        scanner: _fit_stains([pixels for (_, pixels), one in zip(read, scanners, strict=True) if one == scanner])
        for scanner in SCANNERS
    }
    pictures = [
        Picture(
            path.relative_to(data).as_posix(),
            path.parent.name == "tumor",
            part_of(path.stem),
            scanner,
            _codes(pixels, stains[scanner]),
        )
        for (path, pixels), scanner in zip(read, scanners, strict=True)
    ]
    return tuple(pictures), stains


def _pixels(path: Path) -> NDArray[np.uint8] | None:
    """Return the pixels of an image, uint8 (256, 256, 3), or None if it is damaged, has another size or much glass."""
    try:  # Pillow refuses a truncated file, of which OpenCV would return the existing part
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except OSError:
        return None
    if pixels.shape != (PATCH_PX, PATCH_PX, 3):
        return None
    red, green, blue = np.moveaxis(pixels, 2, 0)
    darkest = np.minimum(np.minimum(red, green), blue)  # ten times as fast as the minimum along an axis of three
    return pixels if (darkest < _WHITE_GREY).mean() >= _LEAST_TISSUE else None


def _density(pixels: NDArray[np.uint8], white: float) -> NDArray[np.float64]:
    """Return the optical densities, float64 (3, n), of pixels (rows, cols, 3) on a background of this grey value."""
    of_grey = -np.log(np.clip(np.arange(256, dtype=np.float64), 1, white) / white)
    return np.asarray(of_grey[pixels.reshape(-1, 3).T], np.float64)


def _hue(pixels: NDArray[np.uint8]) -> float:
    """Return how violet an image is: the logarithm of its red optical density over its blue one."""
    red, _, blue = _density(pixels, 245.0).mean(axis=1)
    return math.log((red + 0.01) / (blue + 0.01))


def _two_means(values: NDArray[np.float64]) -> float:
    """Return the boundary between two clusters of numbers (2-means clustering, initialised at the quartiles)."""
    low, high = np.quantile(values, [0.25, 0.75])
    for _ in range(50):
        border = (low + high) / 2
        low, high = values[values <= border].mean(), values[values > border].mean()
    return float((low + high) / 2)


def _fit_stains(pictures: list[NDArray[np.uint8]]) -> DensityFit:
    """Return the stains of all images of a scanner together, by Macenko's method."""
    params = StainParams.model_construct(  # without validation, because a fit needs no target
        method="macenko",
        per_patch=False,
        on_failure="fail",
        sample_tiles=1,
        sample_px=200_000,
        min_tissue_px=1000,
        iterations=1,
        target=None,
    )
    fit = transfer.fit(np.concatenate([pixels[::4, ::4].reshape(-1, 1, 3) for pixels in pictures]), params)
    if not isinstance(fit, DensityFit):
        raise TypeError(type(fit))
    return fit


def _codes(pixels: NDArray[np.uint8], fit: DensityFit) -> textures.Codes:
    """Return the amounts of both stains in an image, uint8 (rows, cols, 2)."""
    amounts = density.stain_codes(_density(pixels, fit.white), np.array([fit.haematoxylin, fit.eosin]), 0.0)
    counts = np.clip(np.rint(amounts / textures.CODE_STEP), 0, 255).astype(np.uint8)
    return counts.T.reshape(*pixels.shape[:2], 2)


def _centers(table: Path) -> dict[str, str]:
    """Return the center of each slide of CAMELYON16, by the name of the slide."""
    rows = tables.read(table, "the table of centers", _ADVICE, ("image", "center")).rows()
    centers = {row["image"].removesuffix(".tif"): row["center"] for row in rows}
    unknown = sorted(set(centers.values()) - set(SCANNERS))
    if unknown:
        cause = f"it has the unknown center {', '.join(unknown)}, expected {' or '.join(SCANNERS)}"
        raise _unusable(ValueError(cause), table)
    return centers


def _outlines(archive: Path) -> Iterator[tuple[str, dict[str, list[NDArray[np.float64]]]]]:
    """Yield the name and the polygons, ``positive`` and ``negative``, of each slide in an archive of outlines."""
    try:
        with tarfile.open(archive) as opened:
            # In the order of the archive, because each step back would decompress it from its beginning.
            texts = [
                (member.name, stream.read())
                for member in opened
                if member.name.endswith(".json") and (stream := opened.extractfile(member)) is not None
            ]
        for name, text in sorted(texts):
            values = json.loads(text)
            yield (
                Path(name).stem.lower(),
                {
                    kind: [np.array(one["vertices"], np.float64) for one in values[kind] if len(one["vertices"]) > 2]
                    for kind in ("positive", "negative")
                },
            )
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise _unusable(error, archive) from error


def _unusable(error: Exception, path: Path) -> WsiflowError:
    """Return the error of a file of the data folder that cannot be used."""
    if isinstance(error, OSError) and faults.number(error):
        return faults.unreadable(error, "the file", _ADVICE, path=path)
    return InputError(f"the file cannot be read ({type(error).__name__}: {error})", _ADVICE, path=path)


def area(outline: NDArray[np.float64]) -> float:
    """Return the area of a polygon, float64 (n, 2), in square pixels."""
    return float(cv2.contourArea(outline.astype(np.float32)))
