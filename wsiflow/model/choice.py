"""The choice of how scores are computed, which is made once for a run: engine, backend, precision and context.

Input: the settings. Output: one `Choice`, which is published before the plan and is part of the key of every task.
This module does not import torch, so a plan can be read without it.
"""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, Field


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

    def score_settings(self) -> dict[str, Any]:
        """Return the properties by name that can change a score and are not part of a slide's frame."""
        batch = self.batch if self.engine == "window" or self.share_until else 0
        frame = {"halo_px", "block_rows", "block_cols"}
        return {key: value for key, value in self._replace(batch=batch)._asdict().items() if key not in frame}


def reason_scores_differ(fine: Choice, coarse: Choice) -> str:
    """Return why two runs of one model may give different scores for the same windows, or an empty text if they do not.

    A window that is run alone has the same bits in all runs with the same batch size. In a dense map of a network that
    does not pad, its fp32 score is the same except for rounding, since another stride is another graph. In bf16 and
    int8 other graphs round differently, and int8 is calibrated for its graph.

    Args:
        fine: Choice of the run with the finer stride.
        coarse: Choice of the run with the coarser stride.
    """
    names = ("engine", "backend", "precision", "share_until")
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
    """How windows become scores.

    Attributes:
        engine: ``dense`` runs the network once over each block, ``window`` once for every window.
        stride: Distance between window centres, reading pixels; divides the tile.
        batch: Windows per call of the network, where it is called for windows.
        precision: Number format of the network; ``auto`` is the faster of fp32 and bf16 here.
        backend: What runs the network; ``auto`` is the fastest that is installed.
        refine: ``window``: of each tile the windows of a coarse stride are run, and the others only where one of those
            scores at least this; elsewhere a coarse score stands for its surroundings. 0: every window is run.
        refine_from: That coarse stride, reading pixels: a multiple of the stride that divides the tile.
    """

    engine: Literal["dense", "window"]
    stride: int = Field(ge=1)
    batch: int = Field(ge=1, le=4096)
    precision: Literal["fp32", "bf16", "int8", "auto"]
    backend: Literal["openvino", "onnxruntime", "torch", "auto"]
    refine: float = Field(ge=0, le=1)
    refine_from: int = Field(ge=1)


class DenseParams(BaseModel, frozen=True, extra="forbid"):
    """How the dense engine works, and how near to the window engine it has to be.

    Attributes:
        halo: Context beyond the outermost windows of a block, reading pixels, for networks that pad (others need none);
            ``exact`` is all that a score can see.
        share_until: Layer up to which windows share their features; after it each window runs alone. Empty: to the end.
        windows: Windows of each slide that are run on their own as well and compared; 0: no certificate, in fp32 only.
        tolerance: Largest mean absolute difference of probability, and largest share of decisions that differ, that a
            run accepts.
        beyond: What becomes of a slide whose scores lie beyond that, or beyond the limits of a lower precision: the run
            stops, or goes on and tells, for those who measure what a setting loses.
    """

    halo: Annotated[int, Field(ge=0, le=4096)] | Literal["exact"]
    share_until: str
    windows: int = Field(ge=0, le=100_000)
    tolerance: float = Field(gt=0, le=1)
    beyond: Literal["stop", "tell"]
