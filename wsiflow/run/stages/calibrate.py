"""The stage ``calibrate``: it calibrates the network for int8 on the tissue of the run, once."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import InputError, SlideModified, WsiflowError
from wsiflow.model import certificate
from wsiflow.run.plan import Plan, read_plan
from wsiflow.run.stages.network import calibration, check_numeric_class, planned_classifier
from wsiflow.run.stages.pixels import planned_blocks
from wsiflow.system import publish
from wsiflow.system.provenance import facts

#: Number of blocks that int8 is calibrated on; they come from as many slides, where there are so many.
CALIBRATION_BLOCKS = 16


def calibrate(source: Path, _index: int) -> tuple[publish.Receipt, bool]:
    """Quantise the network on blocks of the run's own tissue, and publish it as ``engine/int8-<key>.zip``.

    The blocks are drawn by the keys of the slides. A slide that cannot be read is skipped here: its own tasks fail and
    name the reason.

    Raises:
        InputError: There is no tissue.
    """
    from wsiflow.model import scorer

    plan = read_plan(source)
    root = source.parent
    name, key = calibration(root, plan)
    done = publish.done(root, name, key)
    if done is not None:
        return done, False
    check_numeric_class(plan)
    classifier = planned_classifier(plan)  # loaded before the time of the calibration is taken
    with publish.publishing(root, name, key, facts("calibration", ""), publish.accept) as attempt:
        samples = list(_calibration_samples(root, plan))
        if not samples:
            raise InputError(
                "there is no tissue to calibrate int8 on", "set inference.precision=fp32 in another out= folder"
            )
        attempt.path.write_bytes(scorer.quantise(classifier, plan.settings.choice, samples))
    return attempt.receipt, True


def calibration_slides(plan: Plan) -> list[int]:
    """Return the indices of the slides that int8 is calibrated on: the first ones with tissue."""
    return [index for index, planned in enumerate(plan.slides) if planned.n_tiles][:CALIBRATION_BLOCKS]


def _calibration_samples(root: Path, plan: Plan) -> Iterator[NDArray[np.uint8]]:
    """Yield the network's input for blocks that are drawn from the slides."""
    from wsiflow.model import scoring

    slides = calibration_slides(plan)
    for planned in (plan.slides[index] for index in slides):
        each = -(-CALIBRATION_BLOCKS // len(slides))
        drawn = certificate.draw_indices(planned.key, among=planned.n_blocks, count=each).tolist()
        try:
            with planned_blocks(root, plan, planned, drawn) as parts:
                blocks = list(parts)
        except SlideModified:
            raise
        except WsiflowError:
            continue
        for block, pixels in blocks:
            yield scoring.calibration_sample(planned.frame, block, pixels, plan.settings.choice)
