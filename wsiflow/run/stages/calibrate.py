"""The stage ``calibrate``: it calibrates the network for int8 once, on named slides or on the tissue of the run.

Ranges that were chosen on the slides under test say too much in favour of int8: ``inference.calibration`` names a
manifest of other slides, and only where it says ``own`` the run's slides are taken. The network that was calibrated on
named slides is kept in the user's cache folder, by the hash of their content and of all settings that its input depends
on, so that it is calibrated once for any number of runs.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import InputError, IntegrityError, SlideModified, WsiflowError
from wsiflow.model import certificate
from wsiflow.model.cascade import CascadeParams
from wsiflow.run import cases
from wsiflow.run.config import RunConfig
from wsiflow.run.executor.protocol import Outcome
from wsiflow.run.plan import Plan, read_plan
from wsiflow.run.stages import ingest, stain
from wsiflow.run.stages.calibration_set import CALIBRATION_BLOCKS, named_slides
from wsiflow.run.stages.choose import choice_name
from wsiflow.run.stages.network import calibration, check_numeric_class, planned_classifier
from wsiflow.run.stages.pixels import planned_blocks
from wsiflow.slides.manifest import Case
from wsiflow.system import publish
from wsiflow.system.provenance import NUMERICS, facts


def calibrate(source: Path, _index: int) -> tuple[publish.Receipt, bool]:
    """Quantise the network on blocks of tissue, and publish it as ``engine/int8-<key>.zip``.

    The blocks are drawn by the keys of the slides. A slide of the run that cannot be read is skipped here: its own
    tasks fail and name the reason.

    Raises:
        InputError: There is no tissue, a named slide cannot be used, or it is one of those under test.
        IntegrityError: The named slides have changed since the run was begun.
    """
    from wsiflow.model import scorer
    from wsiflow.model.engines.cache import cache_folder, cached

    plan = read_plan(source)
    root = source.parent
    name, key = calibration(root, plan)
    done = publish.done(root, name, key)
    if done is not None:
        return done, False
    check_numeric_class(plan)
    classifier = planned_classifier(plan)  # loaded before the time of the calibration is taken

    def quantised(samples: Iterator[NDArray[np.uint8]]) -> bytes:
        if not (kept := list(samples)):
            raise InputError(
                "there is no tissue to calibrate int8 on", "set inference.precision=fp32 in another out= folder"
            )
        return scorer.quantise(classifier, plan.settings.choice, kept)

    with publish.publishing(root, name, key, facts("calibration", ""), publish.accept) as attempt:
        if plan.settings.calibration:
            _require_other_slides(plan)
            kept_as = publish.key_of(int8=key, numerics=NUMERICS)
            data = cached(cache_folder(), kept_as, lambda: quantised(_named_samples(root, plan)))
        else:
            data = quantised(_calibration_samples(root, plan, skip_unreadable=True))
        attempt.path.write_bytes(data)
    return attempt.receipt, True


def calibration_slides(plan: Plan) -> list[int]:
    """Return the indices of the slides that int8 is calibrated on: the first ones with tissue."""
    return [index for index, planned in enumerate(plan.slides) if planned.n_tiles][:CALIBRATION_BLOCKS]


def _require_other_slides(plan: Plan) -> None:
    """Refuse to calibrate on a slide under test.

    Raises:
        InputError: One of them is.
    """
    both = [planned for planned in plan.slides if planned.sha256 in plan.settings.calibration]
    if both:
        more = f" and {len(both) - 1} more" if len(both) > 1 else ""
        cause = f"int8 would be calibrated on a slide under test{more}, which says too much in favour of it"
        remedy = "name other slides with inference.calibration, or set inference.calibration=own to take the run's"
        raise InputError(cause, f"{remedy}, in another out= folder", slide=both[0].slide_id, path=both[0].path)


def _named_samples(root: Path, plan: Plan) -> Iterator[NDArray[np.uint8]]:
    """Yield the network's input for blocks of the named slides, which are ingested in a folder of their own.

    Raises:
        InputError: A slide cannot be used.
        IntegrityError: The slides have changed since the run was begun.
    """
    config, _ = cases.read_cases(publish.generations(root, "cases.json")[-1])
    manifest = config.inference.calibration
    if not isinstance(manifest, Path):
        raise IntegrityError(
            "the run's configuration names no slides to calibrate int8 on", "choose another out= folder"
        )
    with publish.private_folder(root) as folder:
        own = _plan_named(folder, root, config, named_slides(manifest))
        found = tuple(planned.sha256 for planned in own.slides)
        if found != plan.settings.calibration:
            cause = "the slides that int8 is calibrated on have changed since the run was begun"
            raise IntegrityError(cause, "restore them, or choose another out= folder", path=manifest)
        yield from _calibration_samples(folder, own, skip_unreadable=False)


def _plan_named(folder: Path, root: Path, config: RunConfig, named: Sequence[Case]) -> Plan:
    """Ingest named slides in a folder of their own, measure their colours, and return their plan."""
    choice = choice_name(config)
    (folder / choice).parent.mkdir(parents=True)
    (folder / choice).write_bytes((root / choice).read_bytes())
    whole = config.inference.model_copy(update={"cascade": CascadeParams()})
    store = config.store.model_copy(update={"kind": "none"})
    alone = config.model_copy(update={"share": None, "store": store, "inference": whole})
    source = cases.write_cases(folder, alone, named)
    outcomes = [Outcome(index, ingest.ingest(source, index)[0], executed=True) for index in range(len(named))]
    path = ingest.make_plan(source, outcomes)
    plan = read_plan(path)
    for index in range(len(plan.slides)):
        if stain.STAGE.is_due(plan, index):
            stain.STAGE.work(path, index)
    return plan


def _calibration_samples(root: Path, plan: Plan, *, skip_unreadable: bool) -> Iterator[NDArray[np.uint8]]:
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
            if not skip_unreadable:
                raise
            continue
        for block, pixels in blocks:
            yield scoring.calibration_sample(planned.frame, block, pixels, plan.settings.choice)
