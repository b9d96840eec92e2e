"""The settings of a plan: everything that can change a number, and what tasks must know besides, each said once.

A plan's file holds them in two parts. ``settings`` decides the keys of published files and must be the same for every
plan of a folder; it repeats what follows from the choice of the engine and from the store, so that a reader of the file
and the keys of earlier runs find it there. ``work`` may differ: where the model lies, and what a run tolerates.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel

from wsiflow.evaluation.protocol import EvaluationParams
from wsiflow.heatmap.lesions import LesionParams
from wsiflow.model.card import ModelSpec
from wsiflow.model.choice import FORMER_EXCESS, Choice
from wsiflow.plan.geometry import GeometryParams
from wsiflow.plan.tissue import TissueParams
from wsiflow.run.store import StoreParams
from wsiflow.slides.stain.params import StainParams

# What ``beyond`` in a plan's file means; the file keeps the words of earlier versions.
_EXCESS = {former: now for now, former in FORMER_EXCESS.items()}


class PlanSettings(BaseModel, frozen=True):
    """The settings of a plan.

    Attributes:
        geometry: Which plane of a slide is read, and where scores belong.
        tissue: How tissue is found.
        tile_px: Side of a tile, reading pixels.
        group_tiles: Tissue tiles that a group holds at most.
        window_px: Side of the window that the model sees, reading pixels.
        trained_um_px: Spacing that the model was trained at, micrometres per pixel.
        choice: How scores are computed. It owns the stride, the halo and the size of blocks.
        stain: How colours are normalised.
        store: Where pixels wait between extraction and prediction.
        model: Which model it is, and where its card lies.
        model_identity: SHA-256 of the card and the weights.
        pixel_versions: Versions of the libraries that decode and resample pixels, by name.
        numeric_class: The kind of machine that computes the scores: last bits may differ on another.
        certificate_windows: Windows of each slide that are run on their own as well and compared.
        lesions: How lesions are found on a heatmap.
        evaluation: How detections are scored.
        seed: Seed of the bootstrap.
        tolerance: Largest difference that a certificate may show.
        on_excess: What becomes of a slide whose certificate shows a larger difference.
        shared_layers: Layers up to which windows can share the network, the last first.
        reason: Why scores are computed as they are.
    """

    geometry: GeometryParams
    tissue: TissueParams
    tile_px: int
    group_tiles: int
    window_px: int
    trained_um_px: float
    choice: Choice
    stain: StainParams
    store: StoreParams
    model: ModelSpec
    model_identity: str
    pixel_versions: Mapping[str, str]
    numeric_class: Mapping[str, str]
    certificate_windows: int
    lesions: LesionParams
    evaluation: EvaluationParams
    seed: int
    tolerance: float
    on_excess: Literal["fail", "report"]
    shared_layers: tuple[str, ...]
    reason: str

    @classmethod
    def from_values(cls, settings: Mapping[str, Any], work: Mapping[str, Any]) -> "PlanSettings":
        """Return the settings that the two parts of a plan's file say.

        Raises:
            pydantic.ValidationError: A value is missing or out of bounds.
            KeyError: A part of them is missing.
        """
        cut, predict = settings["cut"], settings["predict"]
        return cls(
            geometry=cut["geometry"],
            tissue=cut["tissue"],
            tile_px=cut["tiles"]["tile_px"],
            group_tiles=cut["tiles"]["group_tiles"],
            window_px=cut["model"]["window_px"],
            trained_um_px=cut["model"]["spacing_um_px"],
            choice=work["choice"],
            stain=predict["stain"],
            store=work["store"],
            model=work["model"],
            model_identity=predict["model"],
            pixel_versions=predict["pixels"],
            numeric_class=predict["numeric_class"],
            certificate_windows=settings["certificate"]["windows"],
            lesions=settings["lesions"],
            evaluation=settings["evaluation"],
            seed=settings["seed"],
            tolerance=work["tolerance"],
            on_excess=_EXCESS.get(work["beyond"], work["beyond"]),
            shared_layers=work["cuts"],
            reason=work["told"],
        )

    @cached_property
    def of_tiles(self) -> dict[str, Any]:
        """What decides which tiles and blocks a slide has, JSON values."""
        return {
            "geometry": self.geometry.model_dump(mode="json"),
            "tissue": self.tissue.model_dump(mode="json"),
            "tiles": {
                "tile_px": self.tile_px,
                "halo_px": self.choice.halo_px,
                "block_rows": self.choice.block_rows,
                "block_cols": self.choice.block_cols,
                "group_tiles": self.group_tiles,
                "part_tiles": self.store.part_tiles,
            },
            "stride": self.choice.stride_px,
            "model": {"window_px": self.window_px, "spacing_um_px": self.trained_um_px},
        }

    @cached_property
    def of_scores(self) -> dict[str, Any]:
        """What decides the scores of a slide's blocks, JSON values: a part of the key of every group's scores."""
        return {
            "model": self.model_identity,
            "inference": self.choice.score_settings(),
            "stain": self.stain.model_dump(mode="json"),
            "store_loss": self.store.loss,
            "pixels": dict(self.pixel_versions),
            "numeric_class": dict(self.numeric_class),
        }

    def numbers(self) -> dict[str, Any]:
        """Return every setting that can change a number, JSON values."""
        return {
            "cut": self.of_tiles,
            "predict": self.of_scores,
            "certificate": {"windows": self.certificate_windows},
            "lesions": self.lesions.model_dump(mode="json"),
            "evaluation": self.evaluation.model_dump(mode="json"),
            "seed": self.seed,
        }

    def work(self) -> dict[str, Any]:
        """Return what tasks must know besides, JSON values."""
        return {
            "store": self.store.model_dump(mode="json"),
            "model": self.model.model_dump(mode="json"),
            "choice": self.choice._asdict(),
            "cuts": list(self.shared_layers),
            "tolerance": self.tolerance,
            "beyond": FORMER_EXCESS[self.on_excess],
            "told": self.reason,
        }
