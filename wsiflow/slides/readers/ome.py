"""The metadata of OME: pixel size, channels and bits per sample of an image, from OME-XML.

Input: the text of an OME-XML document. Output: plain values. The same units are those of OME-Zarr.
"""

import re
from typing import NamedTuple
from xml.etree.ElementTree import Element, ParseError

import defusedxml.ElementTree
from defusedxml.common import DefusedXmlException

UM: dict[str, float] = {
    **dict.fromkeys(("µm", "μm", "um", "micrometer", "micrometre", "micron", "microns"), 1.0),
    **dict.fromkeys(("nm", "nanometer", "nanometre"), 1e-3),
    **dict.fromkeys(("pm", "picometer", "picometre"), 1e-6),
    **dict.fromkeys(("Å", "Å", "angstrom"), 1e-4),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), 1e3),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), 1e4),
    **dict.fromkeys(("dm", "decimeter", "decimetre"), 1e5),
    **dict.fromkeys(("m", "meter", "metre"), 1e6),
    **dict.fromkeys(("in", "inch"), 25_400.0),
    **dict.fromkeys(("mil", "thou"), 25.4),
    **dict.fromkeys(("ft", "foot"), 304_800.0),
}
"""Micrometres of the units of length."""

OTHER_CHANNELS = "use a slide of a stained section; channels that are its colours are to be called Red, Green and Blue"
"""The remedy where channels are not the colours of one picture."""

_RGB_COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
_RGB_NAMES = (("red", "green", "blue"), ("r", "g", "b"))
_PLAIN_NAME = ("channel", "ch", "c", "band", "image", "page", "brightfield", "tl brightfield", "rgb", "")
_DYES = re.compile(
    r"dapi|hoechst|fitc|tritc|\bcy ?[357]\b|[gyrc]fp\b|mcherry|alexa|texas ?red|\bopal\b|spectrum ?(green|orange)",
    re.IGNORECASE,
)
_OF_FLUORESCENCE = ("Fluor", "EmissionWavelength", "ExcitationWavelength")


class Channel(NamedTuple):
    """A channel of an image as its metadata describe it.

    Attributes:
        name: Its name, or an empty text.
        fluorescent: Whether the metadata name a dye, a wavelength or a lamp of fluorescence.
        colour: Red, green and blue in which it is shown, or None.
    """

    name: str
    fluorescent: bool
    colour: tuple[int, int, int] | None


class OmeImage(NamedTuple):
    """An image of an OME-XML document.

    Attributes:
        mpp_x: Micrometres per pixel along x, or None.
        mpp_y: The same along y.
        bits: Significant bits of a sample, or None.
        channels: Its channels; empty where the document lists none.
    """

    mpp_x: float | None
    mpp_y: float | None
    bits: int | None
    channels: tuple[Channel, ...]


def read_images(text: str) -> list[OmeImage]:
    """Return the images of an OME-XML document in its order; none if it is not well-formed."""
    try:
        root = defusedxml.ElementTree.fromstring(text)
    except (ParseError, DefusedXmlException, ValueError):
        return []
    return [_image(element) for image in _children(root, "Image") for element in _children(image, "Pixels")[:1]]


def channel(name: str, colour: tuple[int, int, int] | None) -> Channel:
    """Return a channel of which only the name and the colour are known."""
    return Channel(name, bool(_DYES.search(name)), colour)


def length_um(value: str | float | None, unit: str | None) -> float | None:
    """Return a length in micrometres, or None where the value is no positive number or the unit no length."""
    try:
        length = float(str(value).strip().replace(",", "."))
    except ValueError:
        return None
    factor = UM.get((unit or "µm").strip()) or UM.get((unit or "µm").strip().lower())
    return length * factor if factor and length > 0 else None


def doubt(channels: tuple[Channel, ...], count: int) -> str:
    """Return why images of one colour each are not the red, green and blue of one picture; empty if they may be.

    Args:
        channels: What is known about them.
        count: How many there are.
    """
    names = ", ".join(each.name for each in channels if each.name)
    listed = f"{count} channels ({names})" if names else f"{count} channels"
    if any(each.fluorescent for each in channels):
        return f"it has {listed} of fluorescence, which are not the colours of a stained section"
    if count not in {1, 3}:
        return f"it has {listed}, which are not red, green and blue"
    if count == 3 and rgb_order(channels) is None and not all(_is_plain(each.name) for each in channels):
        return f"it has {listed}, which are not called red, green and blue"
    return ""


def rgb_order(channels: tuple[Channel, ...]) -> list[int] | None:
    """Return the places of red, green and blue among three channels, or None where the metadata do not say them."""
    names = [each.name.strip().lower() for each in channels]
    for rgb in _RGB_NAMES:
        if sorted(names) == sorted(rgb):
            return [names.index(name) for name in rgb]
    colours = [each.colour for each in channels]
    if len(channels) == 3 and all(colours.count(colour) == 1 for colour in _RGB_COLOURS) and all(map(_is_plain, names)):
        return [colours.index(colour) for colour in _RGB_COLOURS]
    return None


def _is_plain(name: str) -> bool:
    """Return whether a name says nothing about a channel, such as ``Channel 2`` or ``C:1``."""
    return name.strip().lower().rstrip("0123456789:-_# ").rstrip(":-_# ") in _PLAIN_NAME


def _image(pixels: Element) -> OmeImage:
    mpp_x, mpp_y = (
        length_um(pixels.get(f"PhysicalSize{a}"), pixels.get(f"PhysicalSize{a}Unit")) for a in "XY"
    )  # one of them is for both
    bits = pixels.get("SignificantBits", "")
    return OmeImage(
        mpp_x or mpp_y,
        mpp_y or mpp_x,
        int(bits) if bits.isdigit() else None,
        tuple(map(_channel, _children(pixels, "Channel"))),
    )


def _channel(element: Element) -> Channel:
    """Return what the metadata say about a channel; its colour is a signed number of 32 bits, RGBA."""
    lit = "epifluorescence" in element.get("IlluminationType", "").lower()
    method = element.get("ContrastMethod", "").lower() == "fluorescence"
    colour = element.get("Color", "")
    try:
        red, green, blue, _ = (int(colour) & 0xFFFFFFFF).to_bytes(4, "big")
        shown = (red, green, blue)
    except ValueError:
        shown = None
    named = channel(element.get("Name", ""), shown)
    return named._replace(
        fluorescent=named.fluorescent or lit or method or any(element.get(name) for name in _OF_FLUORESCENCE)
    )


def _children(element: Element, name: str) -> list[Element]:
    """Return the children of a name in any namespace, since every version of OME has its own."""
    return [child for child in element if isinstance(child.tag, str) and child.tag.rsplit("}", 1)[-1] == name]
