"""The stages that store the pixels of a slide: ``extract`` its parts, and ``index`` one file that links the parts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wsiflow.plan.blocks import size_px
from wsiflow.plan.slide_plan import SlidePlan, pixels_key, read_cut
from wsiflow.run import sharing, store
from wsiflow.run.costs import StageCost
from wsiflow.run.plan import Plan, Task, read_plan
from wsiflow.run.sharing import SharedFile
from wsiflow.run.stages import ingest
from wsiflow.run.stages.pixels import block_coord, open_planned, part_name, read_slide, timed_reads
from wsiflow.run.stages.stage import Stage
from wsiflow.system import publish
from wsiflow.system.provenance import facts


def extract(source: Path, index: int) -> tuple[publish.Receipt, bool]:
    """Read the blocks of a part of a slide and publish them as ``patches/<slide>/p<j>.h5``."""
    plan = read_plan(source)
    root, task = source.parent, EXTRACT.task(plan, index)
    planned, params = plan.slides[task.slide], plan.settings.store
    name, numbers = part_name(planned, task.group), plan.part(*task)
    frame, cut = planned.frame, read_cut(root, planned)
    key = EXTRACT.key_of(root, plan, index)
    place = SharedFile(ingest.shared_folder(root), root, name, key)
    done = sharing.done(place)
    if done is not None:
        return done, False
    receipt_facts = facts("patches", planned.slide_id, part=task.group)
    groups = {k: cut.group(k) for k in numbers}
    sizes = {k: [size_px(frame, block) for block in group] for k, group in groups.items()}

    def verify(path: Path) -> None:
        store.check_patches(path, sizes)

    raw_bytes = sum(rows * cols * 3 for group in sizes.values() for rows, cols in group)
    publish.require_space(place.shared or root, raw_bytes // 3 if params.loss else raw_bytes, less="store=none")
    with sharing.publishing(place, receipt_facts, verify) as attempt:
        with (
            attempt.timed("write"),
            open_planned(root, planned) as opened,
            store.create_patches(attempt.path, frame, _described(planned, key, receipt_facts), params) as writer,
        ):
            for k, group in groups.items():
                parts = timed_reads(read_slide(opened, frame, group), attempt.timed)
                writer.add_group(k, block_coord(frame, group), parts)
            attempt.receipt["decoder"] = opened.decoder
        tiles = sum(len(block.tissue) for group in groups.values() for block in group)
        attempt.receipt["counts"] = {"blocks": sum(map(len, groups.values())), "tiles": tiles}
        attempt.receipt["seconds"]["write"] -= attempt.receipt["seconds"].get(
            "read", 0.0
        )  # pixels are read while the file is written
    return attempt.receipt, True


def _described(planned: SlidePlan, key: str, receipt_facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes that a patches file has besides the frame."""
    versions = receipt_facts["versions"]
    return {"slide_id": planned.slide_id, "slide_sha256": planned.sha256, "key": key, "versions": versions}


def link_patches(source: Path, index: int) -> tuple[publish.Receipt, bool]:
    """Publish ``patches/<slide>.h5``, which shows all parts of the patches of a slide as one file.

    Raises:
        IntegrityError: A part is not published.
    """
    plan = read_plan(source)
    root, planned = source.parent, plan.slides[index]
    parts = {part_name(planned, j): plan.part(index, j) for j in range(1, plan.n_parts(index) + 1)}
    name, key = INDEX.product_of(plan, index), INDEX.key_of(root, plan, index)
    done = publish.done_if_present(root, name, key)
    if done is not None:
        return done, False
    receipt_facts = facts("index", planned.slide_id)
    with publish.publishing(root, name, key, receipt_facts, publish.accept) as attempt, attempt.timed("write"):
        described = _described(planned, key, receipt_facts)
        links = {f"{planned.slide_id}/{Path(part).name}": groups for part, groups in parts.items()}
        store.write_index(attempt.path, planned.frame, described, links)
    return attempt.receipt, True


def _is_due(plan: Plan, _slide: int) -> bool:
    return plan.settings.store.kind == "hdf5"


def _part_key(root: Path, plan: Plan, task: Task) -> str:
    planned, params = plan.slides[task.slide], plan.settings.store
    pixels = pixels_key(planned, read_cut(root, planned))
    numbers = list(plan.part(*task))
    return publish.key_of(pixels=pixels, groups=numbers, compression=params.compression, loss=params.loss)


EXTRACT = Stage(
    name="extract",
    unit="part",
    work=extract,
    product=lambda plan, task: part_name(plan.slides[task.slide], task.group),
    key=_part_key,
    cost=StageCost(0.04, 0.0015),
    steps=("read", "write"),
    is_due=_is_due,
    verified="size",
    serves_scores=True,
)


def _index_key(root: Path, plan: Plan, task: Task) -> str:
    return publish.key_of(slide=plan.slides[task.slide].key, parts=EXTRACT.published(root, plan, task.slide))


INDEX = Stage(
    name="index",
    unit="slide",
    work=link_patches,
    product=lambda plan, task: f"patches/{plan.slides[task.slide].slide_id}.h5",
    key=_index_key,
    cost=StageCost(0.05, 0.0),
    steps=("write",),
    is_due=_is_due,
    serves_scores=True,
)
