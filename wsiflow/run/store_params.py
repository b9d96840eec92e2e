"""The settings of the store, without h5py, which writes it."""

from typing import Literal

from pydantic import BaseModel, Field


class StoreParams(BaseModel, frozen=True, extra="forbid"):
    """Where pixels wait between extraction and prediction."""

    kind: Literal["hdf5", "none"] = Field(
        description="Where pixels wait. hdf5: in files below patches/. none: nowhere, each prediction task reads the "
        "slide again."
    )
    compression: Literal["none", "lzf", "gzip", "jpeg"] = Field(
        description="How pixels are compressed. none, lzf and gzip keep every pixel; jpeg takes a tenth of the space "
        "and changes scores a little."
    )
    quality: int = Field(ge=1, le=100, description="Quality of JPEG, which is without chroma subsampling.")
    part_tiles: int = Field(
        ge=1, description="Number of tissue tiles of a slide that one task reads and writes, to whole groups."
    )

    @property
    def loss(self) -> str:
        """The lossy compression of the pixels, which can change scores; empty where every pixel is kept."""
        return f"jpeg {self.quality}" if (self.kind, self.compression) == ("hdf5", "jpeg") else ""
