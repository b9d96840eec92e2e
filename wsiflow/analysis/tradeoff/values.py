"""What a comparison of settings says, as values: the score, the difference and the core-hours of each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from wsiflow.evaluation.draws import Interval
from wsiflow.evaluation.margin import Power
from wsiflow.evaluation.paired import Difference, FrocBand

_TITLES = {"froc.score": "FROC score", "froc.strict_score": "Strict FROC score", "roc.auc": "Slide AUC"}


class CoreHours(NamedTuple):
    """Core-hours of a setting over its repeats.

    Attributes:
        mean: Mean core-hours; NaN where none were measured.
        sd: Standard deviation over repeats; NaN for fewer than two.
        low, high: Least and most core-hours of a repeat.
        n: Number of repeats that were measured.
    """

    mean: float
    sd: float
    low: float
    high: float
    n: int


NOT_MEASURED = CoreHours(math.nan, math.nan, math.nan, math.nan, 0)


class SettingRow(NamedTuple):
    """One setting of a comparison.

    Attributes:
        name: Parameters that distinguish the setting from the others, such as ``stain=none, stride=16``.
        params: Values of the parameters that differ in the comparison, by short name; the parameter with most values is
            the last one.
        runs: Folders or MLflow run ids of the setting's runs.
        cost: Core-hours over the repeats, by which settings are compared.
        metrics: 95 % intervals by metric name.
        differences: Differences from the reference by metric name; empty for the reference itself.
        delong: p-values of DeLong's test of the AUC against the reference's, uncorrected and corrected; None for the
            reference itself.
        band: FROC curve with its 95 % band.
        pareto: Whether no other setting is cheaper and at least as good, or as cheap and better; a setting that finds
            nothing is not.
        dotted: Values of the parameters that differ in the comparison, by dotted name.
        membership: Share of the redraws of the cases in which the setting is in the Pareto set; NaN without draws.
        family: Family of comparisons that its p-value is corrected for; empty where none is named.
        verdict: Verdict on the margin; None for the reference, and where no margin is asked for.
        power: What the slides say of a larger study; None for the reference, and where it is not asked for.
        line: Core-hours of the line alone.
    """

    name: str
    params: Mapping[str, str]
    runs: tuple[str, ...]
    cost: CoreHours
    metrics: Mapping[str, Interval]
    differences: Mapping[str, Difference]
    delong: tuple[float, float] | None
    band: FrocBand
    pareto: bool = False
    dotted: Mapping[str, str] = MappingProxyType({})
    membership: float = math.nan
    family: str = ""
    verdict: "Verdict | None" = None
    power: Power | None = None
    line: CoreHours = NOT_MEASURED


class Verdict(NamedTuple):
    """Whether a setting is worse than the reference by more than the margin.

    Attributes:
        verdict: ``shown`` (not worse by more than the margin), ``not shown``, or ``worse`` (by more than the margin).
        equivalent: Whether it is also shown that it is not better by more than the margin.
        bound: One-sided 97.5 % bound of the difference, corrected for the family.
        p, p_corrected: p-value of the hypothesis that it is worse by the margin or more, also corrected by Holm's
            method within the family.
        slides: Slides that would show it with a power of 80 % if there is no true difference.
    """

    verdict: str
    equivalent: bool
    bound: float
    p: float
    p_corrected: float
    slides: float


@dataclass(frozen=True)
class Tradeoff:
    """A comparison of settings: score against core-hours.

    Attributes:
        name: Name of the sweep or the experiment.
        reference: Name of the setting that the others are compared with.
        metric: Metric of the Pareto set: ``froc.score``, or ``roc.auc`` where no lesions are annotated.
        rows: The settings.
        common: Settings that have the same value in all runs, by dotted name.
        counts: Numbers of slides, lesions and bootstrap draws by name.
        protocol: Name and hash of the scoring protocol.
        notes: Sentences for the reader, on runs that were left out and on processors that differ.
        margin: Largest loss of the metric that is accepted; None where none is asked for.
        of_line: Whether the costs are those of the line alone, since not all runs have others.
    """

    name: str
    reference: str
    metric: str
    rows: Sequence[SettingRow]
    common: Mapping[str, str]
    counts: Mapping[str, int]
    protocol: tuple[str, str]
    notes: Sequence[str]
    margin: float | None = None
    of_line: bool = False

    @property
    def pareto(self) -> list[SettingRow]:
        """The Pareto set, cheapest first."""
        return sorted((row for row in self.rows if row.pareto), key=lambda row: row.cost.mean)

    @property
    def base(self) -> SettingRow:
        """The reference."""
        return next(row for row in self.rows if row.name == self.reference)


def title(metric: str) -> str:
    """Return the name of a metric for readers."""
    return _TITLES[metric]
