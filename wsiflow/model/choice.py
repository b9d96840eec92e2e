"""The choice of how scores are computed, which is made once for a run: engine, backend, precision and context.

Input: the settings. Output: one `Choice`, which is published before the plan and is part of the key of every task.
This module does not import torch, so a plan can be read without it.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from wsiflow.model.cascade import CascadeParams
from wsiflow.system.paths import AbsolutePath


class Choice(NamedTuple):
    """All properties of inference, besides the model, that can change a score.

    Attributes:
        engine: ``dense`` or ``window``.
        backend: The library that runs the network.
        precision: Number format of the network.
        batch: Number of windows per call, where the network is called for windows.
        stride_px: Distance between windows, reading pixels.
        share_until: Layer up to which windows share the network; after it each runs alone. Empty if all is shared.
        context_px: Width of the context beyond the outermost windows of a dense map, reading pixels.
        exact: Whether dense and window scores are equal except for rounding, because the network does not pad.
        halo_px: Width of the halo around a block's tiles, reading pixels: the reach of the windows plus ``context_px``.
        block_rows, block_cols: Maximum number of tile rows and columns of a block.
        refine: Minimum coarse score with which all windows of a tile are run; 0 if they always are.
        refine_from_px: Distance between the coarse windows, reading pixels; 0 without refinement.
        local: Whether means over the window are taken around every place of a dense map.
    """

    engine: Literal["dense", "window"]
    backend: str
    precision: str
    batch: int
    stride_px: int
    share_until: str
    context_px: int
    exact: bool
    halo_px: int
    block_rows: int
    block_cols: int
    refine: float = 0.0
    refine_from_px: int = 0
    local: bool = False

    def values(self) -> dict[str, Any]:
        """Return the properties by name, as files have them: without those that earlier files lack and few runs use."""
        return {key: value for key, value in self._asdict().items() if key != "local" or value}

    def score_settings(self) -> dict[str, Any]:
        """Return the properties by name that can change a score and are not part of a slide's frame."""
        batch = self.batch if self.engine == "window" or self.share_until else 0
        frame = {"halo_px", "block_rows", "block_cols"}
        return {key: value for key, value in self._replace(batch=batch).values().items() if key not in frame}


def reason_scores_differ(fine: Choice, coarse: Choice) -> str:
    """Return why two runs of one model may give different scores for the same windows, or an empty text if they do not.

    A window that is run alone has the same bits in all runs with the same batch size. In a dense map of a network that
    does not pad, its fp32 score is the same except for rounding, since another stride is another graph. In bf16 and
    int8 other graphs round differently, and int8 is calibrated for its graph.

    Args:
        fine: Choice of the run with the finer stride.
        coarse: Choice of the run with the coarser stride.
    """
    names = ("engine", "backend", "precision", "share_until", "local")
    differing = [name for name in names if getattr(fine, name) != getattr(coarse, name)]
    if differing:
        return f"they were computed with another {', '.join(differing)}"
    if not (fine.exact and coarse.exact):
        return "the network pads, so that a score of a dense map depends on where the map's cells lie"
    if fine.engine == "dense" and fine.precision != "fp32":
        return f"a dense map in {fine.precision} is only valid for the graph of its own stride"
    if fine.engine == "window" and fine.batch != coarse.batch:
        return "windows were run in batches of another size"
    return ""


class InferenceParams(BaseModel, frozen=True, extra="forbid"):
    """How windows become scores."""

    engine: Literal["dense", "window"] = Field(
        description="What the network is run over. dense: once over each block, which gives the scores of all its "
        "windows. window: once for every window."
    )
    stride: int = Field(
        ge=1, description="Distance between the centres of neighbouring windows, reading pixels. It divides the tile."
    )
    batch: int = Field(
        ge=1, le=4096, description="Number of windows in one call of the network, where it is called for windows."
    )
    precision: Literal["fp32", "bf16", "int8", "auto"] = Field(
        description="Number format of the network. bf16 needs a CPU that has it, int8 slides to calibrate it on. "
        "auto: the cheapest of the three whose scores pass the certificate, measured once on a few blocks of the run's "
        "tissue."
    )
    backend: Literal["openvino", "onnxruntime", "torch", "auto"] = Field(
        description="Library that runs the network. auto: the fastest of those that are installed."
    )
    refine: float = Field(
        ge=0,
        le=1,
        description="With engine window: the windows of a coarse stride are run first, and the others of a tile only "
        "where one of those scores at least this; elsewhere a coarse score stands for its surroundings. 0: every "
        "window is run.",
    )
    refine_from: int = Field(
        ge=1,
        description="The coarse stride of refine, reading pixels: a multiple of the stride that divides the tile.",
    )
    stride_alone: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default=0,
        description="The stride instead, where the network looks at windows as a whole, so that they can only run one "
        "by one. auto: half a window, unless the stride was given. 0: the stride all the same.",
    )

    calibration: Literal["own"] | AbsolutePath | None = Field(
        default=None,
        description="What int8 is calibrated on: a manifest of slides that are not under test, of which the first 16 "
        "are taken. own: the slides under test, which says too much in favour of int8. null: int8 is refused.",
    )
    cascade: CascadeParams = CascadeParams()

    @model_serializer(mode="wrap")
    def _without_unused(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what earlier versions did not have, where it is not used, so that files and keys stay the same."""
        values: dict[str, Any] = dump(self)
        later = {"stride_alone", "calibration"}
        if not self.cascade.is_on:
            del values["cascade"]
        return {name: value for name, value in values.items() if name not in later or value}


FORMER_EXCESS: Mapping[Literal["fail", "report"], Literal["stop", "tell"]] = {"fail": "stop", "report": "tell"}
"""What ``dense.beyond`` said, which is ``dense.on_excess`` now, by what that says; plans keep the former words."""


class DenseParams(BaseModel, frozen=True, extra="forbid"):
    """How the dense engine works, and how near to the window engine it has to be."""

    halo: Annotated[int, Field(ge=0, le=4096)] | Literal["exact"] = Field(
        description="Context beyond the outermost windows of a block, reading pixels a side, for networks that pad; "
        "others need none. exact: everything that a score can see."
    )
    share_until: str = Field(
        description="Layer up to which windows share their features; after it each window runs alone. Empty: they "
        "share all layers."
    )
    local: bool = Field(
        default=False,
        description="Whether the means over a window that a network combines with every place of its map "
        "(squeeze-and-excitation) are taken around each place instead, so that windows can share all layers. Scores "
        "then differ from those of single windows, and certificates say by how much.",
    )
    windows: int = Field(
        ge=0,
        le=100_000,
        description="Number of windows of each slide that are run on their own as well and compared: those of its "
        "detections, inside its annotated lesions, near the threshold of detections, and of all other tissue. 0: "
        "nothing is compared, which fp32 alone allows.",
    )
    tolerance: float = Field(
        gt=0,
        le=1,
        description="Largest mean absolute difference of probability that a run accepts, over a slide and inside its "
        "annotated lesions, and largest share of decisions at lesions.threshold that differ.",
    )
    on_excess: Literal["fail", "report"] = Field(
        description="What becomes of a run where the scores of a slide differ by more than the tolerance, or than a "
        "lower precision may. fail: the slide fails. report: the run goes on and says so, for measuring what a setting "
        "loses."
    )

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: object) -> object:
        """Take the former name of a key and its former words, in which older folders say the same."""
        if not isinstance(values, Mapping) or "beyond" not in values:
            return values
        meant = next((now for now, former in FORMER_EXCESS.items() if former == values["beyond"]), values["beyond"])
        if values.get("on_excess", meant) != meant:
            raise ValueError(f"dense.beyond was renamed dense.on_excess: write dense.on_excess={meant}")
        return {name: value for name, value in values.items() if name != "beyond"} | {"on_excess": meant}

    @model_serializer(mode="wrap")
    def _without_unused(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what earlier versions did not have, where it is not used, so that files and keys stay the same."""
        values: dict[str, Any] = dump(self)
        return {name: value for name, value in values.items() if name != "local" or value}
