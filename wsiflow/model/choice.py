"""How scores are computed, settled once for a run: engine, backend, precision, and where dense maps begin.

Input: what the configuration asks for. Output: one `Choice`, published before the plan and part of every task's key.
Nothing here imports torch, so a plan can be read without it.
"""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, Field


class Choice(NamedTuple):
    """Everything about inference that can change a number, besides the model.

    Attributes:
        engine: ``dense`` or ``window``.
        backend: What runs the network.
        precision: Number format of the network.
        batch: Windows per call, where the network is called for windows.
        stride_px: Distance between windows, reading pixels.
        share_until: Layer after which each window runs alone; empty: none.
        context_px: Context beyond the outermost windows of a dense map, reading pixels a side.
        exact: Dense and window scores are equal to rounding: the network does not pad.
        halo_px: Context around a block's tiles, reading pixels a side: the windows' reach and ``context_px``.
        block_rows, block_cols: Most tile rows and columns of a block.
        refine: Least coarse score for which all windows of a tile are run; 0: they always are.
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
        """Return what changes scores and is not in a slide's frame already."""
        batch = self.batch if self.engine == "window" or self.share_until else 0
        frame = {"halo_px", "block_rows", "block_cols"}
        return {key: value for key, value in self._replace(batch=batch)._asdict().items() if key not in frame}


def reason_scores_differ(fine: Choice, coarse: Choice) -> str:
    """Return why the scores of windows that two runs of one model have in common may differ, nothing where they do not.

    Run alone, a window has the same bits in any run of the same batch. In a dense map of a network that does not pad it
    has the same score to rounding, since another stride is another graph: fp32's, that is. In bf16 and int8 another
    graph rounds otherwise, and int8 is calibrated on it.
    """
    names = ("engine", "backend", "precision", "share_until")
    differing = [name for name in names if getattr(fine, name) != getattr(coarse, name)]
    if differing:
        return f"they were computed otherwise: {', '.join(differing)}"
    if not (fine.exact and coarse.exact):
        return "the network pads, so that a score of a dense map depends on where the map's cells lie"
    if fine.engine == "dense" and fine.precision != "fp32":
        return f"a dense map in {fine.precision} is of its own stride's graph alone"
    if fine.engine == "window" and fine.batch != coarse.batch:
        return "windows were run in other batches"
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
