"""What the first pass of a cascade passes over, and what the run's own pass would have found there.

Windows are drawn from the cells that are passed over (`strata.draw_passed_over`), and run one by one in fp32. The share
of those that score above the threshold of detections is an estimate for all that is passed over, with its bound. No
lesion may be passed over that a window in it finds, and most of what the run's own pass finds, inside annotated lesions
where these are known, must lie where it looks. Where it is not known what is tumour, the share of windows above the
threshold must not exceed the tolerance either.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.model import certificate
from wsiflow.model.certificate import Weighing
from wsiflow.plan import cascade
from wsiflow.plan.slide_plan import SlidePlan
from wsiflow.run import first_pass
from wsiflow.run.plan import Plan
from wsiflow.run.stages import ingest, pixels, strata

_LEAST_ABOVE = 3  # windows above the threshold from which on their share is more than chance

RunWindows = Callable[[Iterable[NDArray[np.uint8]]], NDArray[np.float32]]
"""Returns the scores of windows, float32 (n,) or (n, 1 + k)."""


class PassedOver(NamedTuple):
    """What a certificate says of the cells that were passed over.

    Attributes:
        cells, scored: Number of cells that were passed over, and of those that the run's own pass scored.
        above, inside: Number of the latter that score above the threshold of detections, and of those of them that lie
            inside annotated lesions.
        first, expected: Of each drawn window, its score of the first pass, and that of the run's own model in fp32.
        region: Number of the annotated region for which it was drawn; 0 for none.
        weight, part: How it was drawn, see `Weighing`.
    """

    cells: int
    scored: int
    above: int
    inside: int
    first: list[float]
    expected: list[float]
    region: list[int]
    weight: list[float]
    part: list[int]

    def scores(self) -> NDArray[np.float64]:
        """Return the scores of the run's own model, float64 (n,)."""
        return np.array(self.expected, np.float64)

    def weighing(self) -> Weighing:
        """Return how the windows were drawn: each is a unit of its own."""
        n = len(self.weight)
        return Weighing(np.array(self.weight, np.float64), np.array(self.part, np.int64), np.arange(n))


class Estimate(NamedTuple):
    """What the run's own pass would have found in the cells that were passed over.

    Attributes:
        n, n_above: Number of windows, and of those above the threshold of detections.
        cells: Number of cells that were passed over.
        share, share_at_most: Share of these cells that would be above the threshold, and its upper 95 % bound.
        missed: Share of all cells above the threshold that were passed over; 0 where there are none.
    """

    n: int
    n_above: int
    cells: int
    share: float
    share_at_most: float
    missed: float


def look(
    root: Path,
    plan: Plan,
    planned: SlidePlan,
    heat: NDArray[np.float32],
    regions: NDArray[np.int32] | None,
    run: RunWindows,
) -> PassedOver:
    """Run windows that were passed over.

    Args:
        root: The run's folder.
        plan: The run's plan.
        planned: The slide.
        heat: float32 (rows, cols), scores of the run's own pass; NaN where there is none.
        regions: int32 (rows, cols), the annotated regions, see `strata.draw_passed_over`.
        run: Returns the scores of windows that run one by one in fp32.
    """
    _, passed = ingest.cells_of_passes(root, plan, planned)
    first = cascade.first_scores(*first_pass.read_heatmap(root, planned.slide_id), planned.frame)
    drawn = strata.draw_passed_over(passed, first, regions, seed=planned.key, count=plan.settings.certificate_windows)
    scores = run(pixels.windows_at(root, plan, planned, drawn.cells))
    above = heat > plan.settings.lesions.threshold
    return PassedOver(
        cells=int(passed.sum()),
        scored=int(np.isfinite(heat).sum()),
        above=int(above.sum()),
        inside=0 if regions is None else int((above & (regions > 0)).sum()),
        first=first[tuple(drawn.cells.T)].tolist(),
        expected=(scores if scores.ndim == 1 else scores[:, 0]).tolist(),
        region=drawn.region.tolist(),
        weight=drawn.weighing.weight.tolist(),
        part=drawn.weighing.part.tolist(),
    )


def estimate(parts: Sequence[PassedOver], threshold: float) -> Estimate:
    """Return what would have been found over one or several slides."""
    scores = np.concatenate([np.empty(0), *(one.scores() for one in parts)])
    above, cells = scores > threshold, sum(one.cells for one in parts)
    if not len(scores):
        return Estimate(0, 0, cells, 0.0, 0.0, 0.0)
    weighing = certificate.pooled([one.weighing() for one in parts])
    share = float(np.average(above, weights=weighing.weight))
    at_most = certificate.upper_bounds(above[None].astype(np.float64), np.ones(1), weighing)
    found = share * cells + sum(one.above for one in parts)
    return Estimate(
        n=len(scores),
        n_above=int(above.sum()),
        cells=cells,
        share=share,
        share_at_most=float(at_most[0]),
        missed=share * cells / found if found else 0.0,
    )


def lost_lesions(
    one: PassedOver | None, highest: Mapping[str, float] | None, itc: Sequence[int], threshold: float
) -> list[int]:
    """Return the numbers of the annotated regions that were lost by passing over, isolated tumour cells left out.

    No score of the run's own pass in such a region exceeds the threshold, and a window that was passed over does.

    Args:
        one: What was passed over; None where there is no first pass.
        highest: Highest score in each annotated region, by number.
        itc: Numbers of the regions that are isolated tumour cells.
        threshold: Threshold of detections.
    """
    if one is None or highest is None:
        return []
    region = np.array(one.region, np.int64)
    hit = np.unique(region[(region > 0) & (one.scores() > threshold)]).tolist()
    return [number for number in hit if number not in itc and highest.get(str(number), 0.0) <= threshold]


def excess(one: PassedOver, *, is_known: bool, lost: int, threshold: float, tolerance: float) -> list[str]:
    """Return why a slide's first pass has passed over too much; empty where it has not.

    Where it is known what is tumour, what lies outside annotated lesions does not count: it would be false positives.

    Args:
        one: What was passed over.
        is_known: Whether it is known what is tumour on the slide.
        lost: Number of lesions that were lost.
        threshold: Threshold of detections.
        tolerance: Largest share of the cells above the threshold, where it is not known what is tumour.
    """
    reasons, where = [], "" if not is_known else " in annotated lesions"
    if lost:
        what = "a lesion is" if lost == 1 else f"{lost} lesions are"
        reasons.append(f"{what} lost, windows in which score above {threshold:g} there alone")
    hits = (one.scores() > threshold) & (np.array(one.region) > 0 if is_known else True)
    if hits.sum() < _LEAST_ABOVE:
        return reasons
    passed, found = float(np.array(one.weight)[hits].sum()), one.inside if is_known else one.above
    if not is_known and passed > tolerance * one.cells:
        reasons.append(f"{passed / one.cells:.2g} of it would score above {threshold:g}, allowed {tolerance:g}")
    if passed > found:
        share = passed / (passed + found)
        reasons.append(f"{share:.0%} of all scores above {threshold:g}{where} would be there, allowed 50%")
    return reasons
