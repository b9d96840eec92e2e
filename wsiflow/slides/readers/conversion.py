"""What a user is told about a file that is not read: its reason, and a command that converts it.

The commands are those of libvips (``vips``) and Bio-Formats (``bfconvert``), which read what this package does not.
They write a tiled pyramid, which is read fastest.
"""

import shlex
from pathlib import Path

from wsiflow.errors import InputError

_BY_BIO_FORMATS = {
    ".vsi": "Olympus cellSens",
    ".ets": "Olympus cellSens (convert the .vsi beside its folder)",
    ".czi": "Zeiss",
    ".zvi": "Zeiss AxioVision",
    ".lif": "Leica LIF",
    ".lof": "Leica LOF",
    ".nd2": "Nikon",
    ".oir": "Olympus",
    ".oib": "Olympus",
    ".oif": "Olympus",
    ".ims": "Imaris",
}
_BY_VIPS = {".heic": "HEIF", ".heif": "HEIF", ".avif": "AVIF", ".pdf": "PDF", ".fits": "FITS", ".svg": "SVG"}
_BY_VENDOR = {
    ".isyntax": "Philips iSyntax",
    ".i2syntax": "Philips iSyntax",
    ".kfb": "KFBIO",
    ".sdpc": "Sqray",
    ".tmap": "UNIC",
    ".mdsx": "Motic",
    ".afi": "Aperio's list of fluorescence images",
}
_TABLES = (".csv", ".tsv")
_KNOWN_STARTS = {
    **dict.fromkeys((b"\x89PNG", b"\xff\xd8\xff", b"BM", b"GIF8"), ("an ordinary image of another name", "")),
    b"%PDF": ("", ".pdf"),
    b"PK\x03\x04": ("a ZIP archive", ""),
    b"\x1f\x8b": ("a gzip archive", ""),
    b"<!DOCTYPE": ("a web page", ""),
    b"<html": ("a web page", ""),
    b"ZISRAWFI": ("", ".czi"),
    b"\x89HDF": ("an HDF5 file", ""),
    b"<?xml": ("an XML file", ""),
    b"version https://git-lfs": ("a pointer of Git LFS (fetch what it points to: git lfs pull)", ""),
    b"/annex/objects": ("a pointer of git-annex (fetch what it points to: git annex get)", ""),
}


def to_pyramid(path: Path) -> str:
    """Return the command with which libvips writes an image as a tiled pyramid."""
    options = "--tile --pyramid --bigtiff --compression jpeg --Q 90"
    return f"convert it: vips tiffsave {_quoted(path)} {_quoted(_beside(path, '.pyramid.tif'))} {options}"


def to_upright(path: Path) -> str:
    """Return the command with which libvips writes an image upright, as a tiled pyramid."""
    written = f"{_beside(path, '.upright.tif')}[tile,pyramid,bigtiff,compression=jpeg,Q=90]"
    return f"convert it: vips autorot {_quoted(path)} {shlex.quote(written)}"


def to_eight_bits(path: Path) -> str:
    """Return the command with which libvips reduces samples from 0 to 1 to 8 bits; it keeps the colours."""
    written = f"{_beside(path, '.8bit.tif')}[tile,pyramid,bigtiff,compression=deflate]"
    command = f"vips linear {_quoted(path)} {shlex.quote(written)} 255 0 --uchar"
    return f"reduce it to 8 bits, where 255 is 255 divided by the value of white (1 here): {command}"


def to_colours(path: Path) -> str:
    """Return the command with which libvips writes an image in sRGB, as a tiled pyramid."""
    written = f"{_beside(path, '.rgb.tif')}[tile,pyramid,bigtiff,compression=jpeg,Q=90]"
    return f"convert it: vips colourspace {_quoted(path)} {shlex.quote(written)} srgb"


def to_bands(path: Path, count: int) -> str:
    """Return the command with which libvips keeps the first samples of each pixel, as a tiled pyramid."""
    written = f"{_beside(path, '.colours.tif')}[tile,pyramid,bigtiff,compression=jpeg,Q=90]"
    return f"if it is to be left out: vips extract_band {_quoted(path)} {shlex.quote(written)} 0 --n {count}"


def to_ome_tiff(path: Path, options: str = "") -> str:
    """Return the command with which Bio-Formats writes a slide as an OME-TIFF."""
    written = _beside(path, ".ome.tif")
    flags = f"-bigtiff -tilex 512 -tiley 512{options}"
    return f"convert it: bfconvert {flags} {_quoted(path)} {_quoted(written)}"


def is_foreign(path: Path) -> bool:
    """Return whether a file's name is that of a format that no reader knows; some of these begin like a TIFF."""
    return path.suffix.lower() in {*_BY_BIO_FORMATS, *_BY_VIPS, *_BY_VENDOR}


def unknown_file(path: Path) -> InputError:
    """Return the error of a file that no reader knows."""
    if path.suffix.lower() == ".mrxs" and not path.with_suffix("").is_dir():
        cause = f"the folder {path.stem}, in which this slide has its pixels, is not beside it"
        return InputError(cause, "copy the folder too", path=path)
    if path.is_dir():
        return InputError("the folder is not a slide", "name the slide itself, or remove its line", path=path)
    if path.suffix.lower() in _TABLES:
        remedy = f"name the slide itself; slides are listed by dataset=manifest dataset.manifest={_quoted(path)}"
        return InputError("the file is a table, not a slide", remedy, path=path)
    with path.open("rb") as stream:
        start = stream.read(24)
    what, suffix = next((known for begin, known in _KNOWN_STARTS.items() if start.startswith(begin)), ("", ""))
    suffix = path.suffix.lower() if is_foreign(path) else suffix
    if what and not suffix:
        return InputError(f"the file is {what}, not a slide", "name the slide itself, or remove its line", path=path)
    tables = ((_BY_BIO_FORMATS, to_ome_tiff), (_BY_VIPS, to_pyramid), (_BY_VENDOR, _by_vendor))
    for table, converted in tables:
        if suffix in table:
            return InputError(f"slides of the format {table[suffix]} are not read", converted(path), path=path)
    cause = f"the file is not a slide in a format that is read, nor an image (its first bytes are {start[:12]!r})"
    remedy = f"remove it or its line; if Bio-Formats reads it, {to_ome_tiff(path)}"
    return InputError(cause, remedy, path=path)


def _by_vendor(_path: Path) -> str:
    return "export it as TIFF, OME-TIFF or DICOM with its vendor's program"


def _beside(path: Path, ending: str) -> Path:
    stem = path.name.removesuffix(path.suffix).removesuffix(".ome")
    written = path.with_name(f"{stem}{ending}")
    return written if written != path else path.with_name(f"{stem}.converted{ending}")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
