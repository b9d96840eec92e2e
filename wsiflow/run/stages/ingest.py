"""The stage ``ingest``, and the plan that is made of it: slides are hashed, and cut into tiles, blocks and groups.

``cases.json`` holds the resolved configuration and the cases. The record of each slide is published under ``tissue/``,
so that a run that is started again does not inspect a slide twice. Only overviews are read here: the plan is written
before any patch is read.
"""

import base64
import dataclasses
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsiflow.errors import InputError, WsiflowError
from wsiflow.evaluation import truth
from wsiflow.model import card
from wsiflow.model.choice import Choice
from wsiflow.plan import cascade, geometry, outline
from wsiflow.plan.geometry import MAX_UPSAMPLE, Frame
from wsiflow.plan.slide_plan import SlideCut, SlidePlan, cut_name, make_cut, read_cut, slide_key, tile_runs, tissue_grid
from wsiflow.plan.tissue import touching_cells, with_whole_squares
from wsiflow.run import first_pass, sharing
from wsiflow.run.cases import read_cases
from wsiflow.run.config import RunConfig
from wsiflow.run.executor.protocol import Outcome
from wsiflow.run.plan import Plan, Rejected, latest_plan, publish_plan
from wsiflow.run.settings import Cascade, PlanSettings
from wsiflow.run.sharing import SharedFile
from wsiflow.run.stages import overviews
from wsiflow.run.stages.choose import choice_record
from wsiflow.run.stages.selection import check_regions, region_hashes, select
from wsiflow.slides import content, pixel_size, slide
from wsiflow.slides.manifest import Case
from wsiflow.system import publish
from wsiflow.system.provenance import facts

_logger = logging.getLogger(__name__)


def ingest(source: Path, index: int) -> tuple[publish.Receipt, bool]:
    """Open a slide, hash it, find its tissue, and publish its record, mask, outline and cut.

    Raises:
        InputError: The slide cannot be read or scored, or is not the one of the manifest or of an earlier start.
    """
    config, cases = read_cases(source)
    root, case = source.parent, cases[index]
    settings, name = plan_settings(root, config), f"tissue/{case.slide_id}.json"
    if settings.cascade is not None and not first_pass.has_heatmap(root, case.slide_id):
        check_slide(case, config)  # what is wrong with a slide says more than that it has no first scores
    key = record_key(root, case, settings, config)
    done = publish.done(root, name, key)
    if done is not None:
        check_unchanged(root, case.slide_id, case.path)
        _check_manifest_sha256(case, _record(root, case.slide_id)["sha256"])
        if any(publish.done_if_present(root, each, key) is None for each in _published_names(case)[1:]):
            inspection, _ = _shared_inspection(root, case, config)  # a file was deleted: it is published again
            frame = _frame_of_run(inspection["frame"], settings.choice)
            cut = _cut(root, case.slide_id, inspection, frame, settings)
            _publish_beside(root, case, inspection, cut, key)
        return done, False
    marks = check_truth(case, config)
    with publish.publishing(root, name, key, facts("tissue", case.slide_id), publish.accept) as attempt:
        inspection, former_receipt = _shared_inspection(root, case, config)
        if former_receipt is not None:
            attempt.charge(former_receipt)
        sha256, frame = inspection["sha256"], _frame_of_run(inspection["frame"], settings.choice)
        _check_manifest_sha256(case, sha256)
        cut = _cut(root, case.slide_id, inspection, frame, settings)
        record = {
            "sha256": sha256,
            "signature": inspection["signature"],
            "um_px_l0": inspection["um_px_l0"],
            "overview_downsample": inspection["downsample"],
            "frame": frame._asdict(),
            "n_tiles": cut.n_tiles,
            "n_blocks": len(cut.blocks),
            "n_groups": len(cut.group_ranges),
            "key": slide_key(sha256, frame, cut),
            **_notes(case, marks, inspection, config),
        }
        with attempt.uncounted():
            _publish_beside(root, case, inspection, cut, key)
        attempt.path.write_text(json.dumps(record), encoding="utf-8")
    return attempt.receipt, True


def _cut(root: Path, slide_id: str, inspection: Mapping[str, Any], frame: Frame, settings: PlanSettings) -> SlideCut:
    """Return how a slide is cut in this run."""
    tiles, mask = tissue_grid(inspection["tile_runs"]), _mask_of(base64.b64decode(inspection["mask_png"]))
    scored = cells_of_tissue(mask, tiles, frame, settings, downsample=inspection["downsample"])
    if settings.cascade is not None:
        near = cascade.of_tiles(not_passed_over(root, slide_id, frame, settings.cascade), tiles, frame)
        scored = near if scored is None else scored & near
    return make_cut(tiles, frame, group_tiles=settings.group_tiles, scored=scored)


def cells_of_tissue(
    mask: NDArray[np.bool_], tiles: NDArray[np.bool_], frame: Frame, settings: PlanSettings, *, downsample: float
) -> NDArray[np.bool_] | None:
    """Return which cells of the selected tiles are scored where there is no first pass, bool (n, m, m); None for all.

    Args:
        mask: bool (rows, cols), the tissue on the overview.
        tiles: bool (rows, cols), the selected tiles.
        frame: The slide's transform.
        settings: The settings of the plan.
        downsample: Level-0 pixels per pixel of the mask.
    """
    if settings.tissue.windows != "touching":
        return None
    scored = touching_cells(mask, tiles, frame, downsample=downsample)
    if settings.choice.refine:
        scored = with_whole_squares(scored, settings.choice.refine_from_px // frame.stride_px)
    return scored


def not_passed_over(root: Path, slide_id: str, frame: Frame, params: Cascade) -> NDArray[np.bool_]:
    """Return the cells of a slide's heatmap, bool (rows, cols), that the first pass of a cascade does not pass over.

    Raises:
        InputError: The first pass has no scores of the slide.
        IntegrityError: Its scores are damaged.
    """
    first, first_frame = first_pass.read_heatmap(root, slide_id)
    limits = {"threshold": params.threshold, "margin_um": params.margin_um}
    return cascade.looked_at(first, first_frame, frame, **limits)


def cells_of_passes(root: Path, plan: Plan, planned: SlidePlan) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the cells of a slide's heatmap that a run's own pass scores, and those that its first pass passes over.

    Returns:
        Two arrays, bool (rows, cols), of the frame's `Frame.h_shape`. Without a first pass nothing is passed over.
    """
    cut, frame = read_cut(root, planned), planned.frame
    tiles = tissue_grid(cut.tile_runs)
    m, n = frame.cells_per_tile, int(tiles.sum())
    own = cut.scored(frame)
    mask = tissue_of(root, planned.slide_id)
    every = cells_of_tissue(mask, tiles, frame, plan.settings, downsample=planned.overview_downsample)
    all_cells = np.ones((n, m, m), np.bool_)
    fine, whole = (cascade.on_map(all_cells if cells is None else cells, tiles, frame) for cells in (own, every))
    return fine, whole & ~fine


def _notes(case: Case, marks: Any, inspection: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """Return what a user should know of a slide and its truth, for its record; empty where nothing is unusual."""
    sides = {"downsample": inspection["downsample"], "m_downsample": config.evaluation.downsample}
    share = truth.share_of_tissue(marks, _mask_of(base64.b64decode(inspection["mask_png"])), **sides)
    notes = {} if share is None else {"truth_of_tissue": share, "truth_sha256": _truth_files(case)}
    return notes | ({"remarks": remarks} if (remarks := inspection.get("remarks")) else {})


def _published_names(case: Case) -> list[str]:
    """Return the names of the files of a slide that are published before the plan: record, mask, outline and cut."""
    return [*(f"tissue/{case.slide_id}.{kind}" for kind in ("json", "png", "geojson")), cut_name(case.slide_id)]


def _publish_beside(root: Path, case: Case, inspection: Mapping[str, Any], cut: SlideCut, key: str) -> None:
    """Publish the mask, the outline and the cut of a slide, unless they are published already."""
    documents = (
        base64.b64decode(inspection["mask_png"]),
        inspection["outline"].encode(),
        json.dumps(cut.as_dict(), separators=(",", ":")).encode(),
    )
    for name, data in zip(_published_names(case)[1:], documents, strict=True):
        publish.publish_bytes(root, name, data, key, facts("tissue", case.slide_id))
    if "overview_png" in inspection:
        overview = base64.b64decode(inspection["overview_png"])
        publish.publish_bytes(root, overviews.name_of(case.slide_id), overview, key, facts("tissue", case.slide_id))


def _shared_inspection(root: Path, case: Case, config: RunConfig) -> tuple[dict[str, Any], publish.Receipt | None]:
    """Return the result of `_inspect`, and the receipt of the trial that computed it, where that was another trial."""
    if config.share is None:
        return _inspect(root, case, config), None
    # The first trial hashes the content. For the others, path, size and times tell whether it is still that file.
    seen = {"path": str(case.path), "stamp": content.stamp(case.path), **_given_mpp(case)}
    found = config.tissue.model_dump(exclude={"folder", "windows"})
    key = publish.key_of(**seen, frame=_frame_settings(config), tissue=found, **region_hashes(case, config))
    address = SharedFile(config.share, config.share, f"look/{case.slide_id}", key).address
    receipt = sharing.find_receipt(config.share, address)
    if receipt is None:
        with publish.publishing(config.share, address, key, facts("look", case.slide_id), publish.accept) as attempt:
            attempt.path.write_text(json.dumps(_inspect(root, case, config)), encoding="utf-8")
    inspection: dict[str, Any] = json.loads((config.share / address).read_text(encoding="utf-8"))
    return inspection, receipt


def _frame_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that decide how the overview of a slide is read, and what its tile grid is."""
    model = card.read_card(config.model)
    window = {"window_px": model.window_px, "spacing_um_px": model.spacing_um_px}
    return {"geometry": config.geometry.model_dump(), "tile_px": config.tiles.tile_px, "model": window}


def _inspect(root: Path, case: Case, config: RunConfig) -> dict[str, Any]:
    """Open a slide, hash it and find its tissue; nothing of this depends on how windows are cut and scored.

    Returns:
        JSON values by name. ``frame`` is the slide's frame with neutral values for stride, halo and blocks.
    """
    with content.unmodified(case.path, case.slide_id):  # the hash and the overview belong to one content
        signature = content.signature(case.path)
        with slide.open_slide(case.path, slide_id=case.slide_id) as opened:
            um_px, remark = pixel_size.choose(opened.facts, case)
            chosen = select(opened, _frame(opened.facts, um_px, config), case, config)
            corner = opened.facts.l0_bounds_corner
            remarks = [*dict.fromkeys(filter(None, [remark, *opened.facts.notes, chosen.note]))]
            overview = opened.kept_overview(chosen.downsample)
        sha256 = first_pass.known_sha256(root, case.slide_id, signature) or content.sha256(case.path)
    kept = {} if overview is None else {"overview_png": base64.b64encode(overviews.as_png(overview)).decode()}
    return kept | {
        "sha256": sha256,
        "signature": signature,
        "um_px_l0": um_px,
        "downsample": chosen.downsample,
        "frame": chosen.frame._asdict(),
        "tile_runs": tile_runs(chosen.tiles),
        "mask_png": base64.b64encode(outline.tissue_png(chosen.mask)).decode(),
        "outline": outline.tissue_geojson(chosen.mask, downsample=chosen.downsample, offset=(-corner[0], -corner[1])),
        "remarks": remarks,
    }


def check_slide(case: Case, config: RunConfig) -> None:
    """Check all that can be known of a slide before its pixels are read.

    Raises:
        InputError: The slide cannot be opened, its pixel size is not known or does not fit the model, the files that
            say where it is looked at cannot be used, or its truth, see `check_truth`.
        EnvironmentFault: The system refuses to read a file.
    """
    with slide.open_slide(case.path, slide_id=case.slide_id) as opened:
        _frame(opened.facts, pixel_size.choose(opened.facts, case).um_px, config)
        check_regions(opened, case, config)
    check_truth(case, config)


def check_truth(case: Case, config: RunConfig) -> truth.Marks | None:
    """Check that a slide can be scored, before its pixels are read.

    Returns:
        What is annotated on it; None where nothing is.

    Raises:
        InputError: The truth of the slide cannot be read, belongs to another slide, or contradicts the label.
    """
    if case.mask_path is None and case.annotation_path is None:
        return None
    with slide.open_slide(case.path, slide_id=case.slide_id) as opened:
        sized = dataclasses.replace(case, mpp=pixel_size.choose(opened.facts, case).um_px)
        place = truth.place_of(opened.facts)
    return truth.check_truth(sized, config.evaluation, place)


def tissue_of(root: Path, slide_id: str) -> NDArray[np.bool_]:
    """Return the published tissue mask of a slide, bool (rows, cols)."""
    return _mask_of((root / f"tissue/{slide_id}.png").read_bytes())


def _mask_of(png: bytes) -> NDArray[np.bool_]:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image) > 0


def doubtful_share(root: Path, case: Case) -> float | None:
    """Return which part of the tissue of an ingested slide is annotated as tumour where it is nearly all, else None.

    It is not known of a truth that was given or corrected after the slide was ingested.
    """
    record = _record(root, case.slide_id)
    share: float | None = record.get("truth_of_tissue")
    return share if share is not None and record.get("truth_sha256") == _truth_files(case) else None


def _truth_files(case: Case) -> list[str | None]:
    """Return the hashes of the files of a slide's truth."""
    return truth.files_sha256(case.annotation_path, case.mask_path)


def is_ingested(source: Path, index: int) -> bool:
    """Tell whether all files of a case that are published before the plan exist."""
    _, cases = read_cases(source)
    return all(publish.has_recorded_size(source.parent, name) for name in _published_names(cases[index]))


def record_key(root: Path, case: Case, settings: PlanSettings, config: RunConfig) -> str:
    """Return the key of the record of a slide.

    Raises:
        WsiflowError: A file that says where the slide is looked at is missing or cannot be read.
    """
    given: dict[str, Any] = {**_given_mpp(case), **region_hashes(case, config)}
    if settings.cascade is not None:
        given["first"] = first_pass.heatmap_receipt(root, case.slide_id)["sha256"]
    return publish.key_of(slide=case.slide_id, settings=settings.of_tiles, **given)


def _given_mpp(case: Case) -> dict[str, float | None]:
    """Return the pixel sizes that are given for a slide, by name; without the second, keys stay as they were."""
    otherwise = {} if case.mpp_if_none is None else {"mpp_if_none": case.mpp_if_none}
    return {"mpp": case.mpp, **otherwise}


def remarks(root: Path, slide_id: str) -> list[str]:
    """Return what a user should know of how a planned slide is read; nothing where its record has been deleted."""
    try:
        noted: list[str] = _record(root, slide_id).get("remarks", [])
    except FileNotFoundError:
        return []
    return noted


def plan_settings(root: Path, config: RunConfig) -> PlanSettings:
    """Return the settings of a run's plan, from the configuration and from the published choice of the engine."""
    model, record = card.read_card(config.model), choice_record(root, config)
    # Strides share pixels only where blocks do not follow windows.
    like_tiles = config.geometry.convention == "reference" or config.tiles.halo_px == "widest"
    return PlanSettings(
        geometry=config.geometry,
        tissue=config.tissue.model_copy(update={"windows": "all"}) if like_tiles else config.tissue,
        tile_px=config.tiles.tile_px,
        group_tiles=config.tiles.group_tiles,
        window_px=model.window_px,
        trained_um_px=model.spacing_um_px,
        choice=record["choice"],
        stain=config.stain,
        store=config.store,
        model=config.model,
        model_identity=card.identity(model),
        maps=card.map_names(model, config.model),
        pixel_versions=record["pixels"],
        numeric_class=record["numeric_class"],
        calibration=record.get("calibration", ()),
        cascade=first_pass.settings_of(root, config),
        certificate_windows=config.dense.windows,
        lesions=config.lesions,
        evaluation=config.evaluation,
        seed=config.seed,
        tolerance=config.dense.tolerance,
        on_excess=config.dense.on_excess,
        shared_layers=record["cuts"],
        reason=record["told"],
    )


def _frame(about: slide.SlideFacts, um_px: float, config: RunConfig) -> Frame:
    """Return the frame of a slide with neutral values for stride, halo and blocks, see `_frame_of_run`."""
    model = card.read_card(config.model)
    l0_per_px = 1.0
    reading_um_px = config.geometry.spacing
    if reading_um_px != "native":
        reading_um_px = model.spacing_um_px if reading_um_px == "model" else reading_um_px
        l0_per_px = geometry.reading_scale(um_px, reading_um_px, tolerance=config.geometry.tolerance)
    if l0_per_px * config.geometry.max_upsample < 1:
        who = "the model needs" if config.geometry.spacing == "model" else "geometry.spacing is"
        cause, remedy = f"the slide has {um_px:g} um/px, {who} {reading_um_px:g}", _enlarging(1 / l0_per_px)
        raise InputError(cause, remedy, slide=about.slide_id, path=about.path)
    width, height = about.l0_size_px
    rows, cols = geometry.grid_shape(width, height, l0_per_px=l0_per_px, tile_px=config.tiles.tile_px)
    return Frame(
        convention=config.geometry.convention,
        l0_width_px=width,
        l0_height_px=height,
        l0_per_px=l0_per_px,
        um_px=um_px * l0_per_px,
        tile_px=config.tiles.tile_px,
        window_px=model.window_px,
        stride_px=config.tiles.tile_px,
        halo_px=0,
        block_rows=1,
        block_cols=1,
        t_col0=0,
        t_row0=0,
        t_cols=cols,
        t_rows=rows,
    )


def _enlarging(times: float) -> str:
    """Return the remedy where a slide would have to be enlarged ``times`` times."""
    other = "use a model for this spacing, or correct its pixel size (mpp in the manifest, or dataset.mpp)"
    needed = math.ceil(times * 10) / 10  # a value that is rounded down would be refused again
    if needed > MAX_UPSAMPLE:
        return f"{other}: no slide is enlarged more than {MAX_UPSAMPLE} times"
    return f"{other}, or allow enlarging with geometry.max_upsample={needed:.1f} in another out= folder"


def _frame_of_run(frame: Mapping[str, Any], choice: Choice) -> Frame:
    """Return the frame of a slide with the stride, the halo and the blocks of the run."""
    chosen = {name: getattr(choice, name) for name in ("stride_px", "halo_px", "block_rows", "block_cols")}
    return Frame(**{**frame, **chosen})


def check_unchanged(root: Path, slide_id: str, path: Path) -> None:
    """Check that a slide still has the content that was planned; it is hashed only if its files were touched.

    Raises:
        InputError: The content has changed.
    """
    record = _record(root, slide_id)
    if content.signature(path) == record["signature"]:
        return
    sha256 = content.cached_sha256(path)
    if sha256 != record["sha256"]:
        cause = f"its content has changed since the run was planned (SHA-256 {sha256}, was {record['sha256']})"
        raise InputError(cause, "restore it, or choose another out= folder", slide=slide_id, path=path)


def _record(root: Path, slide_id: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((root / f"tissue/{slide_id}.json").read_text(encoding="utf-8"))
    return record


def _check_manifest_sha256(case: Case, sha256: str) -> None:
    if case.sha256 and case.sha256.lower() != sha256:
        cause = f"its SHA-256 is {sha256}, the manifest says {case.sha256}"
        raise InputError(cause, "copy it again from its source", slide=case.slide_id, path=case.path)


def make_plan(source: Path, outcomes: Sequence[Outcome]) -> Path:
    """Make the plan from the records of the slides, and publish it.

    Args:
        source: The ``cases.json`` of the run.
        outcomes: One outcome of `ingest` for each case.

    Returns:
        The file of the plan.

    Raises:
        InputError: The folder holds a plan with other settings, or with other content of a slide.
    """
    config, cases = read_cases(source)
    root = source.parent
    slides, rejected = [], []
    for outcome in sorted(outcomes):
        case = cases[outcome.task]
        if outcome.failure is not None:
            failure = outcome.failure.about(slide=case.slide_id)
            rejected.append(Rejected(case.slide_id, str(failure), failure.exit_code))
        elif outcome.receipt is not None:
            record = json.loads((root / outcome.receipt["path"]).read_text(encoding="utf-8"))
            slides.append(_slide_plan(case, record))
    plan = Plan(plan_settings(root, config), slides, rejected)
    tiles, counts = sum(one.n_tiles for one in slides), (len(slides), len(rejected))
    _logger.info("plan: %d slides, %d rejected, %d tissue tiles in %d groups", *counts, tiles, plan.n_groups)
    return publish_plan(root, plan)


def newest_cases(root: Path) -> Path | None:
    """Return the newest ``cases.json`` of a folder that its plan follows, or None where the folder holds no run.

    A start with other settings or fewer slides than the plan is refused, but its ``cases.json`` stays in the folder. It
    is skipped here, because the folder holds nothing of what it asked for.
    """
    files = publish.generations(root, "cases.json")
    if len(files) > 1 and publish.generations(root, "plan.json"):
        plan = latest_plan(root)
        return next((path for path in reversed(files) if _follows(plan, path)), files[-1])
    return files[-1] if files else None


def shared_folder(root: Path) -> Path | None:
    """Return the folder that a run shares with the other trials of its sweep, or None where it shares nothing."""
    source = newest_cases(root)
    return read_cases(source)[0].share if source else None


def _follows(plan: Plan, source: Path) -> bool:
    """Tell whether a plan belongs to a configuration, and all of its slides to the cases; more slides may join it."""
    config, cases = read_cases(source)
    try:
        same = plan.settings.numbers() == plan_settings(source.parent, config).numbers()
    except (OSError, WsiflowError):  # no engine was chosen for this configuration, or its model is gone
        return False
    return same and {one.slide_id for one in plan.slides} <= {case.slide_id for case in cases}


def case_of(planned: SlidePlan) -> Case:
    """Return a planned slide as a case: its path, its label and its truth."""
    return Case(
        planned.slide_id,
        Path(planned.path),
        label=planned.label,
        annotation_path=Path(planned.annotation_path) if planned.annotation_path else None,
        mask_path=Path(planned.mask_path) if planned.mask_path else None,
    )


def _slide_plan(case: Case, record: Mapping[str, Any]) -> SlidePlan:
    return SlidePlan(
        slide_id=case.slide_id,
        path=str(case.path),
        sha256=record["sha256"],
        um_px_l0=record["um_px_l0"],
        label=case.label,
        annotation_path=str(case.annotation_path or ""),
        mask_path=str(case.mask_path or ""),
        overview_downsample=record["overview_downsample"],
        frame=Frame(**record["frame"]),
        n_tiles=record["n_tiles"],
        n_blocks=record["n_blocks"],
        n_groups=record["n_groups"],
        key=record["key"],
    )
