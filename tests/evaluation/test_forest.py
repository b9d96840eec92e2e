"""The forest: bits of scikit-learn, its file, its choice without the test slides, and published AUCs."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier

from benchmarks import published
from wsiflow.errors import InputError, IntegrityError
from wsiflow.evaluation import forest, roc
from wsiflow.evaluation.forest import Choices, Forest, Settings, TrainingData, grow, load, predict, save, train
from wsiflow.heatmap.features import LEVELS, NAMES
from wsiflow.system import publish

SMALL = Choices(max_features=(5, 20), min_leaf=(1,), trees=12, trees_choosing=6, folds=3)
ALL = bool(os.environ.get("WSIFLOW_FOREST_ALL"))
THRESHOLDS = LEVELS if ALL else (0.9,)
TABLES = ("plain", "noise", "noise, stain")


def drawn(n: int, *, seed: int = 0, patients: int | None = None) -> TrainingData:
    """Return random slides whose features separate the classes weakly at 0.5 and strongly at 0.9."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    shifts = {0.5: 0.3, 0.9: 1.5}
    rows = {t: random.normal(size=(n, len(NAMES))) + shift * labels[:, np.newaxis] for t, shift in shifts.items()}
    ids = tuple(f"slide_{i:03d}" for i in range(n))
    groups = ids if patients is None else tuple(f"patient_{i // 2 % patients}" for i in range(n))
    return TrainingData(ids, labels, groups, rows, forest.version_of(reference=False), 3.9)


@pytest.fixture(scope="module")
def small() -> Forest:
    """Return a forest trained on 60 random slides."""
    return train(drawn(60), seed=1, choices=SMALL)


@pytest.mark.parametrize("kind", ["drawn", "ties", "constant"])
@pytest.mark.parametrize("settings", [Settings(0.9, 20, 10, 1), Settings(0.9, 3, 2, 4)])
def test_our_walk_gives_scikit_learns_probabilities_to_the_bit(kind: str, settings: Settings) -> None:
    """On the slides of the training and on others, with values that lie on thresholds, and with trees of one leaf."""
    sample = drawn(80)
    rows, labels = sample.features[0.9], sample.labels
    rows = {"drawn": rows, "ties": rows.round(1), "constant": np.zeros_like(rows)}[kind]
    theirs = RandomForestClassifier(
        40,
        max_features=settings.max_features,
        max_depth=settings.max_depth,
        min_samples_leaf=settings.min_leaf,
        random_state=7,
    ).fit(rows, labels)
    ours = grow(rows, labels, settings, trees=40, seed=7)
    others = np.concatenate([rows, drawn(50, seed=9).features[0.5], 1e6 * rows])
    np.testing.assert_array_equal(predict(ours, others), theirs.predict_proba(others)[:, 1])


@pytest.mark.slow
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("method", TABLES)
def test_published_sheets_give_the_expected_areas(shared_data: Path, method: str, threshold: float) -> None:
    """O-9: AUC of the fixed forest (all thresholds and three seeds with WSIFLOW_FOREST_ALL=1)."""
    seeds = published.SEEDS if ALL else published.SEEDS[:1]
    found = [published.fixed_auc(shared_data, method, threshold, seed) for seed in seeds]
    assert found == pytest.approx(published.FOREST_AUC[method][threshold][: len(seeds)], abs=0.0015)


def test_on_published_sheets_our_probabilities_are_scikit_learns(shared_data: Path) -> None:
    """300 trees, 129 slides, every bit."""
    sample = published.training(shared_data, "noise")
    rows, labels = sample.features[0.9], sample.labels
    _, others = published.sheet(shared_data, "noise", 0.9, "test")
    theirs = RandomForestClassifier(300, max_features=20, max_depth=10, random_state=42).fit(rows, labels)
    ours = grow(rows, labels, Settings(0.9, 20, 10, 1), trees=300, seed=42)
    np.testing.assert_array_equal(predict(ours, others), theirs.predict_proba(others)[:, 1])
    assert (len(labels), int(labels.sum()), len(others)) == (266, 109, 129)


@pytest.mark.slow
def test_a_choice_on_the_published_training_slides_alone(shared_data: Path) -> None:
    """The small experiment gives plausible numbers and scores the test slides once."""
    settings = {"data": str(shared_data), "method": "noise, stain", "trees_choosing": 10, "quick": True}
    found = published.POINTS["chosen_forest"](settings, seed=0)
    assert found["threshold"] in LEVELS
    assert found["cv_low"] <= found["cv_nested"] <= found["cv_high"]
    assert found["test_low"] <= found["test"] <= found["test_high"]
    assert found["test"] > 0.92
    assert found["optimism"] == found["best_by_test"] - found["test"]


# --- choosing


def test_the_choice_is_the_better_threshold_and_all_that_was_tried_is_told(small: Forest) -> None:
    """The threshold 0.9, which separates better, is chosen, and the card lists all tried settings."""
    card = small.card
    assert card.settings.threshold == 0.9
    assert len(card.tried) == 4
    assert dict(card.tried)[card.settings] == max(area for _, area in card.tried)
    assert (card.n_tumour, card.n_patients, card.folds, card.trees) == (30, 60, 3, 12)
    assert card.auc_low <= card.auc <= card.auc_high
    assert card.training == drawn(60).slide_ids


def test_the_same_seed_gives_the_same_forest(small: Forest) -> None:
    """Another seed gives another forest."""
    again, other = (train(drawn(60), seed=seed, choices=SMALL) for seed in (1, 2))
    assert again.card == small.card
    assert all((one == two).all() for one, two in zip(again.trees, small.trees, strict=True))
    assert other.trees.threshold.tolist() != small.trees.threshold.tolist()


def test_the_area_told_does_not_see_the_slides_it_is_of() -> None:
    """Uninformative features give a nested AUC near 1/2 although the forest fits its training slides."""
    sample = drawn(80)
    random = np.random.default_rng(5)
    noise = sample._replace(features={t: random.normal(size=(80, len(NAMES))) for t in LEVELS})
    found = train(noise, seed=0, choices=SMALL)
    known = found.predict(noise.features[found.card.settings.threshold])
    assert roc.auc(known, noise.labels) > 0.99
    assert found.card.auc < 0.65


def test_slides_of_a_patient_stay_together() -> None:
    """No fold separates the slides of a patient, and every slide is held out once."""
    sample = drawn(60, patients=12)
    outside = []
    for inside, out in forest._folds(sample, 5, 0):
        assert not {sample.groups[i] for i in inside} & {sample.groups[i] for i in out}
        assert set(sample.labels[inside]) == {0, 1}
        outside += out.tolist()
    assert sorted(outside) == list(range(60))


def test_patients_who_are_known_by_heart_do_not_help() -> None:
    """Copies of one slide with random labels: AUC near 1 in folds by slide, near 1/2 in folds by patient."""
    random = np.random.default_rng(2)
    patients, labels = np.repeat(np.arange(40), 3), np.repeat(random.permutation(np.arange(40) % 2), 3)
    rows = random.normal(size=(40, len(NAMES)))[patients] + 1e-3 * random.normal(size=(120, len(NAMES)))
    ids = tuple(f"s{i}" for i in range(120))
    by_slide = TrainingData(ids, labels, ids, {0.5: rows}, "1", 3.9)
    by_patient = by_slide._replace(groups=tuple(f"p{i}" for i in patients))
    choices = SMALL._replace(max_features=(5,), trees=30)
    assert train(by_slide, seed=0, choices=choices).card.auc > 0.95
    assert train(by_patient, seed=0, choices=choices).card.auc < 0.75


@pytest.mark.parametrize(("n", "message"), [(4, "1 patients with tumour"), (2, "1 patients with tumour")])
def test_too_few_patients_are_refused(n: int, message: str) -> None:
    """Two patients of each class leave one for the inner cross-validation."""
    with pytest.raises(InputError, match=f"{message}.*at least three patients"):
        train(drawn(n), seed=0, choices=SMALL)


def test_one_class_and_features_that_are_none_are_refused() -> None:
    """Unusable features and labels are refused before a tree is grown."""
    sample = drawn(10)
    rows = sample.features[0.9]
    with pytest.raises(InputError, match="one class"):
        grow(rows, np.ones(10, np.int64), Settings(0.9, 5, 3, 1), trees=2, seed=0)
    for odd in (np.nan, 1e39):  # the second is finite, but not for scikit-learn
        with pytest.raises(InputError, match="1 of them are not finite"):
            grow(
                np.where(np.arange(300).reshape(10, 30) == 7, odd, rows),
                sample.labels,
                Settings(0.9, 5, 3, 1),
                trees=2,
                seed=0,
            )
    with pytest.raises(InputError, match=r"shape \(10, 29\)"):
        predict(grow(rows, sample.labels, Settings(0.9, 5, 3, 1), trees=2, seed=0), rows[:, 1:])


# --- the file


def test_a_forest_survives_its_file(small: Forest, tmp_path: Path) -> None:
    """A saved forest gives the same card and scores, and the same forest gives the same bytes."""
    save(small, tmp_path / "forest.json")
    found = load(tmp_path / "forest.json")
    assert found.card == small.card
    rows = drawn(30, seed=4).features[0.9]
    np.testing.assert_array_equal(found.predict(rows), small.predict(rows))
    save(found, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "forest.json").read_bytes()
    assert json.loads((tmp_path / "forest.json").read_text())["card"]["training"][:1] == ["slide_000"]


def test_a_changed_file_is_refused(small: Forest, tmp_path: Path) -> None:
    """A single changed digit of a threshold is detected."""
    path = tmp_path / "forest.json"
    save(small, path)
    document = json.loads(path.read_text())
    document["trees"]["threshold"][0] += 1e-9
    path.write_text(json.dumps(document))
    with pytest.raises(IntegrityError, match="hash"):
        load(path)


@pytest.mark.parametrize(("name", "value"), [("left", 0), ("right", 10**6), ("feature", 30), ("roots", -1)])
def test_nodes_that_are_no_trees_are_refused(small: Forest, tmp_path: Path, name: str, value: int) -> None:
    """Nodes with cycles or outside the arrays are refused even with a correct hash."""
    path = tmp_path / "forest.json"
    save(small, path)
    document = json.loads(path.read_text())
    document["trees"][name][0] = value
    content = {part: document[part] for part in ("card", "trees")}
    path.write_text(json.dumps(document | {"sha256": publish.key_of(**content)}))
    with pytest.raises(IntegrityError, match="do not form trees"):
        load(path)


@pytest.mark.parametrize(("part", "name"), [("card", "settings"), ("card", "seed"), ("trees", "value")])
def test_an_incomplete_file_is_refused(small: Forest, tmp_path: Path, part: str, name: str) -> None:
    """A file of another program with a correct hash is refused."""
    path = tmp_path / "forest.json"
    save(small, path)
    document = json.loads(path.read_text())
    del document[part][name]
    content = {part: document[part] for part in ("card", "trees")}
    path.write_text(json.dumps(document | {"sha256": publish.key_of(**content)}))
    with pytest.raises(IntegrityError, match=f"incomplete.*{name}"):
        load(path)


@pytest.mark.parametrize("text", ["", "[]", '{"format": "another"}', "\x80\x04pickle"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    """A file of any other content is only read as text."""
    (tmp_path / "forest.json").write_text(text)
    with pytest.raises(InputError, match="forest"):
        load(tmp_path / "forest.json")
    with pytest.raises(InputError, match=r"the forest cannot be read .*train the forest again"):
        load(tmp_path / "absent.json")
