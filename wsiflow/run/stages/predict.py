"""The stages that compute scores: how, once for a run (``choose``, ``calibrate``), and a group's (``predict``).

Every stage has the form of `wsiflow.run.stages.work`. torch is imported where a stage needs it, in a worker whose
threads are limited.
"""

import gc
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import EnvironmentFault, InputError, IntegrityError, Rewritten, WsiflowError
from wsiflow.model import card, certificate
from wsiflow.model.choice import Choice
from wsiflow.plan import plan
from wsiflow.plan.geometry import Frame
from wsiflow.plan.plan import Plan, Task
from wsiflow.run import store
from wsiflow.run.stages import ingest
from wsiflow.run.stages.pixels import Colours, planned_blocks
from wsiflow.system import publish, usage
from wsiflow.system.provenance import facts, numeric_class, pixel_versions, thread_count

if TYPE_CHECKING:
    from wsiflow.model.classifier import Classifier
    from wsiflow.model.scorer import Dense, Windows

#: Blocks that int8 is calibrated on, from as many slides where there are so many.
CALIBRATION_BLOCKS = 16


def choose(source: Path, _index: int) -> tuple[publish.Receipt, bool]:
    """Settle how the run computes scores, and publish it as ``engine/<key>.json``; all of it is warm-up."""
    config, _ = ingest.read_cases(source)
    root, name, key = source.parent, ingest.choice_name(config), ingest.choice_key(config)
    done = publish.done(root, name, key)
    if done is not None:
        return done, False
    with usage.warming_up(), publish.publishing(root, name, key, facts("choice", ""), publish.accept) as attempt:
        from wsiflow.run.stages.choose import settle

        if (root / name).exists():  # measured before, by a run that died before its receipt
            attempt.path.write_bytes((root / name).read_bytes())
        else:
            settled = settle(_classifier(config.model), config, threads=thread_count())
            settled |= {"numeric_class": numeric_class(), "pixels": pixel_versions()}
            attempt.path.write_text(json.dumps(settled, indent=1, sort_keys=True), encoding="utf-8")
    return attempt.receipt, True


def predict(source: Path, index: int) -> tuple[publish.Receipt, bool]:
    """Predict one group and publish ``predictions/<slide>/t<k>.h5``."""
    made = plan.read(source)
    root, task = source.parent, made.task("predict", index)
    planned = made.slides[task.slide]
    name, key = prediction_name(made, task), plan.task_key(root, made, task)
    done = publish.done(root, name, key)
    if done is not None:
        return done, False
    check_numeric_class(made)
    score, warmup_s = _timed_scorer(root, made)
    cut, frame = plan.read_cut(root, planned), planned.frame
    blocks = cut.group(task.group)
    coord = tile_coord(frame, [cell for block in blocks for cell in block.cells()])
    receipt_facts = facts("prediction", planned.slide_id, group=task.group, warmup_s=warmup_s)

    def verify(path: Path) -> None:
        written, prob = store.read_predictions(path)
        if not np.array_equal(written, coord) or prob.shape[1:] != (frame.cells_per_tile,) * 2:
            raise IntegrityError("the scores do not belong to the planned tiles", "report this", path=path)

    described = {
        "slide_id": planned.slide_id,
        "slide_sha256": planned.sha256,
        "model": made.settings["predict"]["model"],
        "key": key,
        "versions": receipt_facts["versions"],
    }
    with publish.publishing(root, name, key, receipt_facts, verify) as attempt:
        wanted, colours = range(*cut.group_ranges[task.group - 1]), Colours(root, made, planned)
        with planned_blocks(root, made, planned, wanted, attempt.timed, colours) as parts:
            prob, windows = score.score(frame, parts, attempt.timed)
        attempt.receipt["stain_failures"] = colours.failures
        if planned_choice(made).precision == "int8":
            attempt.receipt["calibration_sha256"] = publish.file_sha256(root / calibration(root, made).name)
        publish.require_space(root, prob.nbytes + coord.nbytes)
        with attempt.timed("write"):
            store.write_predictions(attempt.path, frame, coord, prob, described)
        attempt.receipt["counts"] = {"blocks": len(blocks), "tiles": len(coord), "windows": windows}
    return attempt.receipt, True


def check_numeric_class(made: Plan) -> None:
    """Refuse to compute scores here under the key of another kind of machine.

    Raises:
        EnvironmentFault: Processor, library or threads would give other last bits than the plan says.
    """
    planned = made.settings["predict"]["numeric_class"] | made.settings["predict"]["pixels"]
    here = numeric_class() | pixel_versions()
    differing = [
        f"{name} is {here[name]!r}, planned {planned.get(name)!r}" for name in here if here[name] != planned.get(name)
    ]
    if differing:
        remedy = "run on the kind of machine the run was planned on, or choose another out= folder"
        raise EnvironmentFault(f"this machine gives other last bits: {'; '.join(differing)}", remedy, stage="predict")


def prediction_name(made: Plan, task: Task) -> str:
    """Return the name of a task's file, relative to the run's folder."""
    return f"predictions/{made.slides[task.slide].slide_id}/t{task.group}.h5"


def published(root: Path, made: Plan, task: Task) -> publish.Receipt:
    """Return the receipt of a group's scores.

    Raises:
        IntegrityError: The group is not published.
    """
    name = prediction_name(made, task)
    receipt = publish.done(root, name, plan.task_key(root, made, task))
    if receipt is None:
        slide_id = made.slides[task.slide].slide_id
        raise IntegrityError("the group was not predicted", "run again", slide=slide_id, path=root / name)
    return receipt


def tile_coord(frame: Frame, cells: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Return int64 (n, 5): column, row, level-0 x and y of the tile's corner, its side in level-0 px."""
    side = frame.tile_px * frame.l0_per_px
    return np.array([(c, r, round(c * side), round(r * side), round(side)) for c, r in cells], dtype=np.int64).reshape(
        -1, 5
    )


def _classifier(spec: card.ModelSpec) -> "Classifier":
    """Return the model, loaded once per process for as long as its card says the same."""
    return _loaded(spec, card.identity(card.read_card(spec)))


@lru_cache(maxsize=1)
def _loaded(spec: card.ModelSpec, _identity: str) -> "Classifier":
    """Load the model; torch is imported here so that a worker's threads are limited before."""
    with usage.warming_up():
        from wsiflow.model.classifier import load

        return load(spec)


def planned_classifier(made: Plan) -> "Classifier":
    """Return the plan's classifier.

    Raises:
        IntegrityError: Card or weights are no longer what was planned.
    """
    model = _classifier(card.ModelSpec.model_validate(made.work["model"]))
    if model.identity != made.settings["predict"]["model"]:
        cause = "the model is another than when the run was planned"
        raise IntegrityError(
            cause, "restore card and weights, or choose another out= folder", path=made.work["model"]["card"]
        )
    return model


def planned_choice(made: Plan) -> Choice:
    """Return how the plan's scores are computed."""
    return Choice(**made.work["choice"])


def _scorer(root: Path, made: Plan) -> "Windows | Dense":
    """Return what computes the plan's scores; prepared once per process."""
    model, choice = planned_classifier(made), planned_choice(made)
    quantised = root / calibration(root, made).name if choice.precision == "int8" else None
    if quantised is not None and not quantised.exists():
        raise IntegrityError("the network was not calibrated for int8", "run again", path=quantised)
    return scorer_for(model, choice, quantised)


def _timed_scorer(root: Path, made: Plan) -> "tuple[Windows | Dense, float]":
    """Return what computes the plan's scores, and the core-seconds that preparing it took just now."""
    before = usage.warmup_s()
    return _scorer(root, made), usage.warmup_s() - before


@lru_cache(maxsize=4)
def scorer_for(model: "Classifier", choice: Choice, quantised: Path | None = None) -> "Windows | Dense":
    """Return what computes scores as chosen, prepared once per process; ``quantised`` is the network in int8."""
    with usage.warming_up():
        from wsiflow.model import scorer

        data = None if quantised is None else quantised.read_bytes()
        return scorer.make(model, choice, threads=thread_count(), quantised=data)


def release() -> None:
    """Give back the memory of prepared networks; the next task of this process that needs one prepares it again."""
    scorer_for.cache_clear()
    gc.collect()


class Calibration(NamedTuple):
    """Name, relative to the run's folder, and key of the network in int8."""

    name: str
    key: str


def calibration(root: Path, made: Plan) -> Calibration:
    """Return what the network in int8 is published as; it follows the slides of the run's first plan."""
    first = plan.read(publish.generations(root, "plan.json")[0])
    key = publish.key_of(predict=made.settings["predict"], slides=[planned.key for planned in first.slides])
    return Calibration(f"engine/int8-{key[:12]}.zip", key)


def calibrate(source: Path, _index: int) -> tuple[publish.Receipt, bool]:
    """Quantise the network on blocks of the run's own tissue, and publish it as ``engine/int8-<key>.zip``.

    The blocks come from as many slides as there are, drawn by the slides' keys. Slides that cannot be read are left to
    their own tasks to tell of.

    Raises:
        InputError: There is no tissue.
    """
    from wsiflow.model import scorer

    made = plan.read(source)
    root = source.parent
    name, key = calibration(root, made)
    done = publish.done(root, name, key)
    if done is not None:
        return done, False
    check_numeric_class(made)
    classifier = planned_classifier(made)  # loaded here, it is not a part of what the calibration costs
    with publish.publishing(root, name, key, facts("calibration", ""), publish.accept) as attempt:
        samples = list(_calibration_samples(root, made))
        if not samples:
            raise InputError(
                "there is no tissue to calibrate int8 on", "set inference.precision=fp32 in another out= folder"
            )
        attempt.path.write_bytes(scorer.quantise(classifier, planned_choice(made), samples))
    return attempt.receipt, True


def calibration_slides(made: Plan) -> list[int]:
    """Return the slides that int8 is calibrated on: the first ones with tissue."""
    return [index for index, planned in enumerate(made.slides) if planned.n_tiles][:CALIBRATION_BLOCKS]


def _calibration_samples(root: Path, made: Plan) -> Iterator[NDArray[np.uint8]]:
    """Yield what the network sees of blocks drawn from the slides."""
    from wsiflow.model import scorer

    slides = calibration_slides(made)
    for planned in (made.slides[index] for index in slides):
        each = -(-CALIBRATION_BLOCKS // len(slides))
        wanted = certificate.draw(planned.key, among=planned.n_blocks, wanted=each).tolist()
        try:
            with planned_blocks(root, made, planned, wanted) as parts:
                found = list(parts)
        except Rewritten:
            raise
        except WsiflowError:
            continue
        for block, pixels in found:
            yield scorer.sample(planned.frame, block, pixels, planned_choice(made))
