"""Analysis of finished runs: comparison of settings, equivalence of heatmaps, and exports for reviewers."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from wsiflow.analysis.reviewers.imrmc import export_imrmc
    from wsiflow.analysis.reviewers.regulatory import export
    from wsiflow.analysis.runs import FinishedRun
    from wsiflow.analysis.scored import ScoredRun
    from wsiflow.analysis.tradeoff.rows import compare_runs

__all__ = ["FinishedRun", "ScoredRun", "compare_runs", "export", "export_imrmc"]

# Loaded by whoever asks first: most commands need little of it.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "reviewers.imrmc": ["export_imrmc"],
        "reviewers.regulatory": ["export"],
        "runs": ["FinishedRun"],
        "scored": ["ScoredRun"],
        "tradeoff.rows": ["compare_runs"],
    },
)
