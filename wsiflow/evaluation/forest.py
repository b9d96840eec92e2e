"""Random forest that maps the features of a slide to the probability that it holds tumour.

Input: features (n, 30) of `features.describe` for each threshold, labels, and the patient of each slide. Output: a
`Forest`, which predicts from its own arrays and is stored in one JSON file: no pickle, and reading it runs no code.

The settings of a forest, including the threshold of the regions, are chosen by cross-validation on the training slides.
Folds are stratified by class, and slides of one patient stay in one fold. The reported AUC comes from a nested
cross-validation: each fold is scored by a forest whose settings were chosen, and whose trees were grown, without it.
The highest AUC among the choices would be too optimistic, and choosing by a test set would spoil the test set.

scikit-learn grows the trees. It is imported only in the functions that train: scoring does not need it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import InputError, IntegrityError
from wsiflow.evaluation import roc
from wsiflow.heatmap import features
from wsiflow.system import faults, publish

FORMAT = "wsiflow forest 1"
CELL_TOLERANCE = 0.1
"""Largest relative difference at which two sizes of heatmap cells count as the same."""

_LARGEST = float(np.finfo(np.float32).max)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Settings(NamedTuple):
    """Hyperparameters of a forest.

    Attributes:
        threshold: Probability above which heatmap cells form the regions that the features describe.
        max_features: Number of features that a split may choose from.
        max_depth: Largest depth of a tree.
        min_leaf: Fewest training slides in a leaf.
    """

    threshold: float
    max_features: int
    max_depth: int
    min_leaf: int


class Choices(NamedTuple):
    """The grid of hyperparameters to choose from, and the size of the cross-validation.

    Attributes:
        max_features, max_depth, min_leaf: Values to try, see `Settings`; each combination is tried with each threshold.
        trees: Number of trees of the final forest.
        trees_choosing: Number of trees of the forests that are compared during the choice.
        folds: Largest number of folds; there are fewer where a class has fewer patients.
    """

    max_features: tuple[int, ...] = (5, 20)
    max_depth: tuple[int, ...] = (10,)
    min_leaf: tuple[int, ...] = (1, 3)
    trees: int = 300
    trees_choosing: int = 100
    folds: int = 5


class TrainingData(NamedTuple):
    """Training slides with their features.

    Attributes:
        slide_ids: Names of the slides.
        labels: int64 (n,), 1 for tumour, 0 for normal.
        groups: Patient of each slide; slides of one patient stay in one fold.
        features: float64 (n, 30) by threshold.
        version: Version of the features, see `version_of`.
        cell_um: Side of the heatmaps' cells, um.
    """

    slide_ids: tuple[str, ...]
    labels: Ints
    groups: tuple[str, ...]
    features: Mapping[float, Floats]
    version: str
    cell_um: float

    def part(self, index: Ints) -> "TrainingData":
        """Return the slides at the indices ``index``, int64 (k,)."""
        ids, groups = (tuple(values[i] for i in index) for values in (self.slide_ids, self.groups))
        kept = {threshold: values[index] for threshold, values in self.features.items()}
        return self._replace(slide_ids=ids, labels=self.labels[index], groups=groups, features=kept)


class Trees(NamedTuple):
    """Decision trees as arrays over the nodes of all trees.

    Attributes:
        roots: int64 (t,), root node of each tree.
        feature: int64 (m,), feature that a node tests; -1 in a leaf.
        threshold: float64 (m,), a value less than or equal to this goes to the left child.
        left, right: int64 (m,), child nodes; a leaf is its own child.
        value: float64 (m,), share of tumour slides among the training slides in the node.
    """

    roots: Ints
    feature: Ints
    threshold: Floats
    left: Ints
    right: Ints
    value: Floats


class Card(NamedTuple):
    """Description of a trained forest.

    Attributes:
        version: Version of the features, see `version_of`.
        settings: The chosen hyperparameters.
        trees: Number of trees.
        cell_um: Side of the heatmap cells in training, um.
        training: Names of the training slides.
        n_tumour: Number of training slides with tumour.
        n_patients: Number of patients of the training slides.
        folds: Number of folds of the cross-validation.
        auc, auc_low, auc_high: AUC in nested cross-validation on the training slides, and DeLong's 95 % interval, which
            assumes independent slides.
        tried: Each tried combination of hyperparameters with its cross-validated AUC.
        seed: Seed of folds and trees.
        scikit_learn: Version of scikit-learn that grew the trees.
    """

    version: str
    settings: Settings
    trees: int
    cell_um: float
    training: tuple[str, ...]
    n_tumour: int
    n_patients: int
    folds: int
    auc: float
    auc_low: float
    auc_high: float
    tried: tuple[tuple[Settings, float], ...]
    seed: int
    scikit_learn: str


class Forest(NamedTuple):
    """The trees of a forest with the description of their training."""

    card: Card
    trees: Trees

    def predict(self, rows: Floats) -> Floats:
        """Return the probability of tumour of each slide, see `predict`."""
        return predict(self.trees, rows)


def version_of(*, reference: bool) -> str:
    """Return the version of the features: which formulas they follow, with or without the quirks of the reference."""
    return "reference-1" if reference else "1"


def is_same_cell(cell_um: float, other_um: float) -> bool:
    """Tell whether two sizes of heatmap cells differ by at most `CELL_TOLERANCE`."""
    return abs(cell_um / other_um - 1) <= CELL_TOLERANCE


def train(sample: TrainingData, *, seed: int, choices: Choices | None = None) -> Forest:
    """Choose hyperparameters by cross-validation, estimate the AUC by nested cross-validation, and train on all slides.

    Args:
        sample: The training slides.
        seed: Seed of folds and trees; the same seed gives the same forest.
        choices: The grid of hyperparameters; None for the default grid.

    Raises:
        InputError: A class has slides of fewer than three patients, or a feature is not finite.
    """
    import sklearn

    choices = choices or Choices()
    scores = _nested_scores(sample, choices, seed)
    low, high = roc.auc_interval(scores, sample.labels)
    chosen, tried = _choose(sample, choices, seed)
    card = Card(
        version=sample.version,
        settings=chosen,
        trees=choices.trees,
        cell_um=sample.cell_um,
        training=sample.slide_ids,
        n_tumour=int(sample.labels.sum()),
        n_patients=len(set(sample.groups)),
        folds=_n_folds(sample, choices.folds),
        auc=roc.auc(scores, sample.labels),
        auc_low=low,
        auc_high=high,
        tried=tried,
        seed=seed,
        scikit_learn=sklearn.__version__,
    )
    return Forest(card, _grown(sample, chosen, choices.trees, seed))


def grow(rows: Floats, labels: Ints, settings: Settings, *, trees: int, seed: int) -> Trees:
    """Grow a forest on slides.

    Args:
        rows: float64 (n, 30), features at the threshold of the settings.
        labels: int64 (n,), 1 for tumour, 0 for normal.
        settings: Hyperparameters of the forest.
        trees: Number of trees.
        seed: Seed of the trees.

    Raises:
        InputError: There is only one class, or a feature is not finite.
    """
    from sklearn.ensemble import RandomForestClassifier

    _check(rows)
    if len(set(labels.tolist())) != 2:
        raise InputError("the slides are of one class only", "give tumour and normal slides", stage="forest")
    grown = RandomForestClassifier(
        n_estimators=trees,
        max_features=settings.max_features,
        max_depth=settings.max_depth,
        min_samples_leaf=settings.min_leaf,
        random_state=seed,
    ).fit(rows, labels)
    return _joined([_arrays(tree.tree_) for tree in grown.estimators_])


def predict(trees: Trees, rows: Floats) -> Floats:
    """Return the probability of tumour of each slide, the mean over the trees.

    Features are compared in float32 and the trees are summed one by one, as scikit-learn does, so that both give the
    same bits.

    Args:
        trees: The trees of the forest.
        rows: float64 (n, 30), features of the slides.

    Returns:
        float64 (n,), probabilities.

    Raises:
        InputError: A feature is not finite, or there are not 30 features.
    """
    _check(rows)
    values = rows.astype(np.float32)
    slides = np.arange(len(values))[:, np.newaxis]
    at = np.tile(trees.roots, (len(values), 1))
    while (inner := trees.feature[at] >= 0).any():
        goes_left = values[slides, trees.feature[at]] <= trees.threshold[at]
        at = np.where(inner, np.where(goes_left, trees.left[at], trees.right[at]), at)
    total: Floats = np.cumsum(trees.value[at], axis=1)[:, -1] / len(trees.roots)
    return total


def save(forest: Forest, path: Path) -> None:
    """Write a forest as JSON, atomically.

    Raises:
        EnvironmentFault: The file cannot be written.
    """
    card = forest.card._asdict() | {
        "settings": forest.card.settings._asdict(),
        "tried": [settings._asdict() | {"auc": auc} for settings, auc in forest.card.tried],
    }
    content = {"card": card, "trees": {name: values.tolist() for name, values in forest.trees._asdict().items()}}
    document = {"format": FORMAT, "sha256": publish.key_of(**content), **content}
    publish.write_view(path.parent, path.name, (json.dumps(document, separators=(",", ":")) + "\n").encode())


def load(path: Path) -> Forest:
    """Read a forest that `save` wrote.

    Raises:
        InputError: The file cannot be read, or is not a forest of this format.
        IntegrityError: The content does not have the stored hash, or the nodes do not form trees.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        remedy = "name an existing file, or train the forest again"
        raise faults.unreadable(error, "the forest", remedy, path=path) from error
    except ValueError as error:
        cause = f"this is not a readable forest ({error})"
        raise InputError(cause, "train the forest again", path=path) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        cause = f"the format of the file is not {FORMAT!r}"
        raise InputError(cause, "give a file that wsiflow forest train wrote", path=path)
    content = {name: document.get(name) for name in ("card", "trees")}
    if publish.key_of(**content) != document.get("sha256"):
        cause = "the content of the forest does not have the hash that the file states"
        raise IntegrityError(cause, "train the forest again", path=path)
    try:
        return Forest(_card(document["card"]), _trees(document["trees"], path))
    except (KeyError, TypeError, ValueError) as error:
        cause = f"the content of the forest is incomplete ({error})"
        raise IntegrityError(cause, "train the forest again", path=path) from error


def _card(values: dict[str, Any]) -> Card:
    tried = [dict(each) for each in values["tried"]]
    return Card(
        **values
        | {
            "settings": Settings(**values["settings"]),
            "training": tuple(values["training"]),
            "tried": tuple((Settings(**each), auc) for each in tried for auc in [each.pop("auc")]),
        }
    )


def _trees(values: dict[str, Any], path: Path) -> Trees:
    """Return the arrays of the trees; children must come after their node, so that every walk from a root ends.

    Raises:
        IntegrityError: The nodes do not form trees.
    """
    whole, fractions = np.int64, np.float64
    kinds = Trees(whole, whole, fractions, whole, whole, fractions)._asdict()  # type: ignore[arg-type]
    trees = Trees(**{name: np.asarray(values[name], kind) for name, kind in kinds.items()})
    nodes = np.arange(len(trees.feature))
    inner = trees.feature >= 0
    sound = (
        len(trees.roots) > 0
        and all(len(values) == len(nodes) for values in trees[1:])
        and bool(((trees.roots >= 0) & (trees.roots < len(nodes))).all())
        and bool((trees.feature < len(features.NAMES)).all())
        and all(bool(((each > nodes) & (each < len(nodes)))[inner].all()) for each in (trees.left, trees.right))
    )
    if not sound:
        raise IntegrityError("the nodes of the forest do not form trees", "train the forest again", path=path)
    return trees


# --- choosing


def _nested_scores(sample: TrainingData, choices: Choices, seed: int) -> Floats:
    """Return the score of each slide in nested cross-validation: by a forest chosen and grown without its fold."""
    scores = np.full(len(sample.labels), np.nan)
    for inside, outside in _folds(sample, choices.folds, seed):
        part = sample.part(inside)
        chosen, _ = _choose(part, choices, seed)
        grown = _grown(part, chosen, choices.trees, seed)
        scores[outside] = predict(grown, sample.features[chosen.threshold][outside])
    return scores


def _choose(sample: TrainingData, choices: Choices, seed: int) -> tuple[Settings, tuple[tuple[Settings, float], ...]]:
    """Return the settings with the highest cross-validated AUC, the first of equal ones, and all tried settings."""
    options = product(sorted(sample.features), choices.max_features, choices.max_depth, choices.min_leaf)
    folds = list(_folds(sample, choices.folds, seed))
    tried = tuple(
        (settings, _held_out_auc(sample, settings, folds, choices, seed)) for settings in map(Settings._make, options)
    )
    return max(tried, key=lambda each: each[1])[0], tried


def _held_out_auc(
    sample: TrainingData, settings: Settings, folds: Sequence[tuple[Ints, Ints]], choices: Choices, seed: int
) -> float:
    scores = np.full(len(sample.labels), np.nan)
    for inside, outside in folds:
        grown = _grown(sample.part(inside), settings, choices.trees_choosing, seed)
        scores[outside] = predict(grown, sample.features[settings.threshold][outside])
    return roc.auc(scores, sample.labels)


def _folds(sample: TrainingData, most: int, seed: int) -> Iterator[tuple[Ints, Ints]]:
    """Yield the indices of the training slides and of the held-out slides of each fold."""
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(_n_folds(sample, most), shuffle=True, random_state=seed)
    yield from splitter.split(np.zeros(len(sample.labels)), sample.labels, sample.groups)


def _n_folds(sample: TrainingData, most: int) -> int:
    """Return the number of folds: at most ``most``, and at most the number of patients of either class.

    Raises:
        InputError: A class has fewer than two patients.
    """
    patients = [
        len({group for group, label in zip(sample.groups, sample.labels, strict=True) if label == kind})
        for kind in (0, 1)
    ]
    if min(patients) < 2:
        cause = f"a part of the training slides has {patients[1]} patients with tumour and {patients[0]} without"
        remedy = "train on at least three patients of each class; where there are three, on more or with another --seed"
        raise InputError(cause, remedy, stage="forest")
    return min(most, *patients)


# --- trees


def _grown(sample: TrainingData, settings: Settings, trees: int, seed: int) -> Trees:
    return grow(sample.features[settings.threshold], sample.labels, settings, trees=trees, seed=seed)


def _arrays(tree: Any) -> Trees:
    """Return a tree of scikit-learn as arrays; a leaf is its own child."""
    nodes = np.arange(tree.node_count)
    leaf = tree.children_left < 0
    return Trees(
        np.zeros(1, np.int64),
        np.where(leaf, -1, tree.feature).astype(np.int64),
        np.where(leaf, 0.0, tree.threshold),
        np.where(leaf, nodes, tree.children_left).astype(np.int64),
        np.where(leaf, nodes, tree.children_right).astype(np.int64),
        tree.value[:, 0, 1].astype(np.float64),
    )


def _joined(trees: Sequence[Trees]) -> Trees:
    """Concatenate the arrays of trees and renumber their nodes."""
    first = np.cumsum([0, *(len(tree.feature) for tree in trees)])[:-1]
    moved = [
        tree._replace(roots=tree.roots + start, left=tree.left + start, right=tree.right + start)
        for tree, start in zip(trees, first.tolist(), strict=True)
    ]
    return Trees(*(np.concatenate(values) for values in zip(*moved, strict=True)))


def _check(rows: Floats) -> None:
    odd = ~(np.abs(rows) <= _LARGEST)  # True for NaN
    if rows.ndim != 2 or rows.shape[1] != len(features.NAMES) or odd.any():
        cause = f"the features have shape {rows.shape}, and {int(odd.sum())} of them are not finite in float32"
        raise InputError(cause, f"give {len(features.NAMES)} finite numbers for each slide", stage="forest")
