"""What a method of stain normalisation is: one record, declared in the method's own file."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from wsiflow.slides.stain.fits import Pixels


class MethodParams(Protocol):
    """The settings that methods read; `wsiflow.slides.stain.params.StainParams` has them."""

    @property
    def iterations(self) -> int:
        """Steps of a search that goes in steps."""
        ...


class PixelSample(NamedTuple):
    """The pixels that colours are measured on, RGB.

    Attributes:
        tissue: Shape (n, 3), pixels of tissue, in which stains are searched.
        measured: Shape (m, 3), pixels over which spreads and strengths are measured.
        white: Grey value of the background.
    """

    tissue: Pixels
    measured: Pixels
    white: float


class StainMethod(NamedTuple):
    """A method of stain normalisation.

    Attributes:
        name: Its name in the configuration and in fits.
        form: The class of its fits.
        measure: Returns the fit of a sample. Raises InputError where colours cannot be measured.
        transfer: Returns an image (rows, cols, 3) with its colours mapped from one fit to another.
        brightens: Whether the reference stretches the channels of a patch, after its luminosity, before it is fitted.
    """

    name: str
    form: type[Any]
    measure: Callable[[PixelSample, MethodParams], Any]
    transfer: Callable[[Pixels, Any, Any], Pixels]
    brightens: bool = True
