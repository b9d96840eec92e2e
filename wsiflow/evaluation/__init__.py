"""Evaluation of scores: FROC for lesions, ROC for slides, calibration, and the uncertainty of each."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from wsiflow.evaluation import froc, roc
    from wsiflow.evaluation.evaluate import Evidence, Scores, evaluate_cases, evaluate_folder
    from wsiflow.evaluation.matches import EvaluationRecord, read_matches
    from wsiflow.evaluation.protocol import EvaluationParams
    from wsiflow.evaluation.truth import Truth, read_truth

__all__ = [
    "EvaluationParams",
    "EvaluationRecord",
    "Evidence",
    "Scores",
    "Truth",
    "evaluate_cases",
    "evaluate_folder",
    "froc",
    "read_matches",
    "read_truth",
    "roc",
]

# Loaded by whoever asks first: most commands need little of it.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submodules=["froc", "roc"],
    submod_attrs={
        "evaluate": ["Evidence", "Scores", "evaluate_cases", "evaluate_folder"],
        "matches": ["EvaluationRecord", "read_matches"],
        "protocol": ["EvaluationParams"],
        "truth": ["Truth", "read_truth"],
    },
)
