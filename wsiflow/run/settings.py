"""The settings of a plan: everything that can change a number, and the other settings that tasks need.

The file of a plan holds them in two parts. ``settings`` decides the keys of published files, and is the same in every
plan of a folder. It repeats values that follow from the choice of the engine and from the store, so that readers of the
file and the keys of earlier runs find them there. ``work`` may differ between plans: it says where the model is and
what a run tolerates.
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
from wsiflow.run.store_params import StoreParams
from wsiflow.slides.stain.params import StainParams

# Values of ``on_excess`` by those of ``beyond`` in the file of a plan, which keeps the words of earlier versions.
_EXCESS = {former: now for now, former in FORMER_EXCESS.items()}


class Cascade(BaseModel, frozen=True):
    """What decides at which places of a slide the run's own pass of a cascade looks, besides the scores there.

    Attributes:
        threshold: Score of the first pass from which on a place is looked at.
        margin_um: Width around such places that is looked at as well, um.
        first: Hash of the settings of the first pass.
        development: SHA-256 of the slides on which the threshold was chosen; empty where it was given.
    """

    threshold: float
    margin_um: float
    first: str
    development: tuple[str, ...] = ()


class PlanSettings(BaseModel, frozen=True):
    """The settings of a plan.

    Attributes:
        geometry: The spacing at which slides are read, and the convention that places scores on them.
        tissue: How tissue is found.
        tile_px: Side of a tile, reading pixels.
        group_tiles: Most tissue tiles of a group.
        window_px: Side of the model's window, reading pixels.
        trained_um_px: Spacing that the model was trained at, micrometres per pixel.
        choice: How scores are computed, with the stride, the halo and the size of blocks.
        stain: How colours are normalised.
        store: Where pixels wait between extraction and prediction.
        model: The model, and the path of its card.
        model_identity: SHA-256 of the card and the weights.
        maps: Names of the classes that have a heatmap beside that of the positive score, in the order of the card.
        pixel_versions: Versions of the libraries that decode and resample pixels, by name.
        numeric_class: The kind of machine that computes the scores; the last bits may differ on another kind.
        calibration: SHA-256 of the named slides that int8 is calibrated on; empty where it is on the run's own.
        cascade: Where the run looks after a first pass; None where it has none.
        certificate_windows: Number of windows of each slide that are also run singly and compared.
        lesions: How lesions are found on a heatmap.
        evaluation: How detections are scored.
        seed: Seed of the bootstrap.
        tolerance: Largest difference that a certificate may have, see `wsiflow.model.choice.DenseParams`.
        on_excess: Whether a slide with a larger difference fails, or the run goes on and reports it.
        shared_layers: Names of the layers up to which windows can share the network, the last layer first.
        reason: Why scores are computed like this.
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
    maps: tuple[str, ...] = ()
    pixel_versions: Mapping[str, str]
    numeric_class: Mapping[str, str]
    calibration: tuple[str, ...] = ()
    cascade: Cascade | None = None
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
        """Return the settings from the two parts of the file of a plan.

        Raises:
            pydantic.ValidationError: A value is out of bounds.
            KeyError: A value is missing.
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
            maps=predict.get("maps", ()),
            pixel_versions=predict["pixels"],
            numeric_class=predict["numeric_class"],
            calibration=predict.get("calibration", ()),
            cascade=cut.get("cascade"),
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
        """The settings that decide which tiles and blocks a slide has, as JSON values."""
        cascade = {} if self.cascade is None else {"cascade": self.cascade.model_dump(mode="json")}
        return cascade | {
            "geometry": self.geometry.model_dump(mode="json"),
            # What the files of a folder say is in the keys of the slides, and where it lies changes no number.
            "tissue": self.tissue.model_dump(mode="json", exclude={"folder"}),
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
        """The settings that decide the scores of blocks, as JSON values; the key of every group contains them."""
        # Without further classes and named slides, keys are what they were.
        rare = {"maps": list(self.maps), "calibration": list(self.calibration)}
        return {name: value for name, value in rare.items() if value} | {
            "model": self.model_identity,
            "inference": self.choice.score_settings(),
            "stain": self.stain.model_dump(mode="json"),
            "store_loss": self.store.loss,
            "pixels": dict(self.pixel_versions),
            "numeric_class": dict(self.numeric_class),
        }

    def numbers(self) -> dict[str, Any]:
        """Return every setting that can change a number, as JSON values."""
        return {
            "cut": self.of_tiles,
            "predict": self.of_scores,
            "certificate": {"windows": self.certificate_windows},
            "lesions": self.lesions.model_dump(mode="json"),
            "evaluation": self.evaluation.model_dump(mode="json"),
            "seed": self.seed,
        }

    def work(self) -> dict[str, Any]:
        """Return the other settings that tasks need, as JSON values."""
        return {
            "store": self.store.model_dump(mode="json"),
            "model": self.model.model_dump(mode="json"),
            "choice": self.choice.values(),
            "cuts": list(self.shared_layers),
            "tolerance": self.tolerance,
            "beyond": FORMER_EXCESS[self.on_excess],
            "told": self.reason,
        }
