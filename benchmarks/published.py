"""Points of the experiments on published results: feature sheets and slide scores of Li, Mikailov and Chen.

Input: the folder of the published files, settings with one value for each axis, and the number of the repeat. Output:
numbers by name. Only the forest is random: repeats 0, 1 and 2 have the seeds 42, 0 and 1, with which the expected AUCs
were computed by scikit-learn alone.
"""

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsiflow.evaluation import forest, roc
from wsiflow.evaluation.forest import Choices, Settings, TrainingData
from wsiflow.heatmap.features import LEVELS, NAMES

SEEDS = (42, 0, 1)
REFERENCE = {"max_features": 20, "max_depth": 10, "min_leaf": 1}
CELL_UM = 16 * 0.243

_FOLDER = "published/dldp/RF_parameters"
_SHEETS = {
    "plain": "PF_parameter_Method_I/{0}_{1}_0502_Method_I_no_norm",
    "noise": "PF_parameter_Method_II_Model_I_no_norm/{0}_{1}_0502_Method_II_no_norm",
    "noise, stain": "RF_parameter_Method_II_Model_I_norm/{1}/{0}_{1}_0506_Method_II_Model_I_norm",
}
"""Feature sheets of the three models: plain, trained with colour noise, and with noise on stain-normalised slides."""

FOREST_AUC = {
    "plain": {
        0.5: (0.908, 0.898, 0.896),
        0.6: (0.905, 0.913, 0.907),
        0.7: (0.895, 0.894, 0.899),
        0.8: (0.876, 0.881, 0.882),
        0.9: (0.894, 0.893, 0.884),
    },
    "noise": {
        0.5: (0.918, 0.922, 0.925),
        0.6: (0.913, 0.920, 0.894),
        0.7: (0.927, 0.923, 0.939),
        0.8: (0.946, 0.937, 0.942),
        0.9: (0.958, 0.958, 0.964),
    },
    "noise, stain": {
        0.5: (0.962, 0.964, 0.955),
        0.6: (0.967, 0.965, 0.964),
        0.7: (0.973, 0.977, 0.969),
        0.8: (0.978, 0.979, 0.978),
        0.9: (0.981, 0.980, 0.982),
    },
}
"""O-9: AUC on the test slides of a forest with fixed settings (300 trees, 20 features, depth 10), for each seed."""

SCORES_AUC = {
    "plain": ("Method_I", 0.915561, 0.025770),
    "noise": ("Method_II_noise_only", 0.942092, 0.021844),
    "noise, stain": ("Method_II_noise_norm", 0.983929, 0.008553),
}
"""O-10: column of the published slide scores, their AUC and its standard deviation."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@cache
def sheet(data: Path, method: str, threshold: float, kind: str) -> tuple[tuple[str, ...], Floats]:
    """Return the slides of a sheet (``tumor``, ``normal`` or ``test``) and their features, float64 (n, 30)."""
    name = _SHEETS[method].format(kind, round(10 * threshold))
    folder, _, file = name.rpartition("/")
    with (data / _FOLDER / folder / f"data_sheet_for_random_forest_16_strike_{file}.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return tuple(row["name"] for row in rows), np.array([[float(row[name]) for name in NAMES] for row in rows])


def training(data: Path, method: str) -> TrainingData:
    """Return the training slides with features at every threshold; each slide counts as a patient of its own."""
    sheets = {t: [sheet(data, method, t, kind) for kind in ("tumor", "normal")] for t in LEVELS}
    (tumour, _), (normal, _) = sheets[LEVELS[0]]
    assert all(one[0] == tumour and other[0] == normal for one, other in sheets.values())
    return TrainingData(
        slide_ids=tumour + normal,
        labels=np.repeat([1, 0], [len(tumour), len(normal)]),
        groups=tumour + normal,
        features={t: np.concatenate([one[1], other[1]]) for t, (one, other) in sheets.items()},
        version=forest.version_of(reference=True),
        cell_um=CELL_UM,
    )


def labels_of_the_test_slides(data: Path) -> Ints:
    """Return int64 (n,), the labels of the test slides in the order of the sheets."""
    with (data / "camelyon16/tables/reference.csv").open(newline="") as stream:
        truth = {row["image"]: row["type"] == "tumor" for row in csv.DictReader(stream)}
    names, _ = sheet(data, "plain", LEVELS[0], "test")
    return np.array([truth[name] for name in names], np.int64)


def fixed_auc(data: Path, method: str, threshold: float, seed: int) -> float:
    """Return the AUC on the test slides of a forest with the fixed settings of the reference system."""
    sample = training(data, method)
    settings = Settings(threshold=threshold, **REFERENCE)
    grown = forest.grow(sample.features[threshold], sample.labels, settings, trees=300, seed=seed)
    return roc.auc(forest.predict(grown, sheet(data, method, threshold, "test")[1]), labels_of_the_test_slides(data))


def _fixed(settings: Mapping[str, Any], *, seed: int) -> dict[str, float]:
    method, threshold = settings["method"], settings["threshold"]
    expected = FOREST_AUC[method][threshold][seed]
    auc = fixed_auc(Path(settings["data"]), method, threshold, SEEDS[seed])
    return {"auc": auc, "expected": expected, "difference": abs(auc - expected)}


def _chosen(settings: Mapping[str, Any], *, seed: int) -> dict[str, float]:
    """Choose a forest on the training slides, score the test slides once, and compare with choosing on test slides."""
    folder, method = Path(settings["data"]), settings["method"]
    choices = Choices(min_leaf=(1,), trees_choosing=settings["trees_choosing"])
    if settings["quick"]:
        choices = Choices(max_features=(20,), min_leaf=(1,), trees=20, trees_choosing=10, folds=3)
    trained = forest.train(training(folder, method), seed=SEEDS[seed], choices=choices)
    card, labels = trained.card, labels_of_the_test_slides(folder)
    scores = trained.predict(sheet(folder, method, card.settings.threshold, "test")[1])
    low, high = roc.auc_interval(scores, labels)
    best = max(areas[seed] for areas in FOREST_AUC[method].values())
    held_out = max(area for _, area in card.tried)
    area = roc.auc(scores, labels)
    return {
        "threshold": card.settings.threshold,
        "max_features": card.settings.max_features,
        "cv_best": held_out,
        "cv_nested": card.auc,
        "cv_low": card.auc_low,
        "cv_high": card.auc_high,
        "test": area,
        "test_low": low,
        "test_high": high,
        "best_by_test": best,
        "optimism": best - area,
    }


def _scored(settings: Mapping[str, Any], *, seed: int) -> dict[str, float]:  # noqa: ARG001 - nothing is drawn
    data, method = Path(settings["data"]), settings["method"]
    column, area, deviation = SCORES_AUC[method]
    with (data / "published/dldp/RF_results/reference_all_final_results_0515.csv").open(newline="") as stream:
        rows = {row["slide_name"]: float(row[column]) for row in csv.DictReader(stream)}
    names, _ = sheet(data, method, LEVELS[0], "test")
    scores, labels = [rows[name.removesuffix(".tif")] for name in names], labels_of_the_test_slides(data)
    low, high = roc.auc_interval(scores, labels)
    auc, auc_deviation = roc.auc(scores, labels), roc.delong_variance(scores, labels) ** 0.5
    return {
        "auc": auc,
        "expected": area,
        "deviation": auc_deviation,
        "expected_deviation": deviation,
        "low": low,
        "high": high,
        "difference": max(abs(auc - area), abs(auc_deviation - deviation)),
    }


POINTS = {"published_forest": _fixed, "chosen_forest": _chosen, "published_scores": _scored}
