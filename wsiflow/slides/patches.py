"""Labelled patches on disk: a folder of images for each class.

Input: the folder. Output: uint8 (n, side, side, 3), RGB, and the index of each patch's class.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from wsiflow.errors import InputError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}


def read_labelled(
    folder: Path, class_names: Sequence[str], side: int, *, limit: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the first patches of each class, in the order of their names.

    Args:
        folder: The folder, which holds a folder for each class that is to be read, named as the class.
        class_names: Names of the classes; upper and lower case are the same.
        side: Side of a patch, px; of a larger image its middle is taken.
        limit: Maximum number of patches of each class.

    Returns:
        uint8 (n, side, side, 3), RGB, and int64 (n,), the indices of their classes.

    Raises:
        InputError: Fewer than two classes have a folder with images, or an image is damaged or too small.
    """
    if not folder.is_dir():
        raise InputError("there is no such folder", "name the folder of the patches", path=folder)
    folders = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    patches, classes, seen = [], [], []
    for index, name in enumerate(class_names):
        files = sorted(folders[name.lower()].iterdir()) if name.lower() in folders else []
        files = [path for path in files if path.suffix.lower() in _SUFFIXES][:limit]
        patches += [_patch(path, side) for path in files]
        classes += [index] * len(files)
        seen += [name] * bool(files)
    if len(seen) < 2:
        raise InputError(
            f"of the classes {list(class_names)} only {seen} have a folder with images",
            "put the patches of each class into a folder of its name, as .png, .jpg, .tif, .bmp or .webp",
            path=folder,
        )
    return np.stack(patches), np.array(classes, np.int64)


def _patch(path: Path, side: int) -> NDArray[np.uint8]:
    """Return the middle of an image, uint8 (side, side, 3)."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"the image cannot be read: {error}", "remove or replace it", path=path) from error
    if min(pixels.shape[:2]) < side:
        raise InputError(
            f"the image has {pixels.shape[1]} x {pixels.shape[0]} px, windows of the model have {side}",
            "give patches of the size of a window, at the spacing of the card",
            path=path,
        )
    y, x = ((length - side) // 2 for length in pixels.shape[:2])
    return pixels[y : y + side, x : x + side]
