"""From blocks to the scores of their tiles: every scorer is compared with a simple loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from wsiflow.errors import InputError
from wsiflow.model import prepared, scorer, scoring
from wsiflow.model.architectures.registry import build
from wsiflow.model.card import ModelCard, Probe, Resize
from wsiflow.model.choice import Choice
from wsiflow.model.classifier import Classifier, as_classifier, predict
from wsiflow.model.dense import network
from wsiflow.model.dense.network import densify
from wsiflow.model.engines.cache import cache_folder
from wsiflow.model.engines.engine import installed_backends
from wsiflow.plan import geometry
from wsiflow.plan.blocks import Block, blocks_at, origin_px, size_px
from wsiflow.plan.geometry import Frame
from wsiflow.system.usage import untimed

RNG = np.random.default_rng(7)
BLOCK = Block(3, 2, 3, 2, (0, 1, 4, 5))
PLAIN = Choice("window", "torch", "fp32", 8, 56, "", 0, exact=True, halo_px=84, block_rows=3, block_cols=3)


def card(window_px: int = 224, input_px: int = 224) -> ModelCard:
    return ModelCard(
        name="tiny",
        architecture="inception_valid",
        architecture_args={},
        class_names=("normal", "tumour"),
        positive_class="tumour",
        window_px=window_px,
        input_px=input_px,
        spacing_um_px=0.25,
        mean=(0.5, 0.4, 0.6),
        std=(0.2, 0.3, 0.2),
        weights="tiny.safetensors",
        sha256="0" * 64,
        probe=(),
        licence="",
        trained_on="",
        notes="",
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test its own cache, because random networks share a key that their converted graphs must not."""
    monkeypatch.setenv("WSIFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def inception() -> Classifier:
    """Return a narrow Inception without padding, with random weights and differing probabilities."""
    torch.manual_seed(0)
    network = build("inception_valid", 2, width=0.125, dropout=0.0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    # One pass sets the statistics of the norms; without it random layers give the same for every window.
    network.train()(torch.from_numpy(images(4, 224, 224)).permute(0, 3, 1, 2) / 64 - 2)
    return as_classifier(network, card())


@pytest.fixture(scope="module")
def googlenet() -> Classifier:
    """Return GoogLeNet with random weights and classes that are separated, so that probabilities differ."""
    torch.manual_seed(3)
    network = build("googlenet", 2, dropout=0.5)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return as_classifier(network, card())


def images(n: int, rows: int, cols: int) -> np.ndarray:
    return RNG.integers(0, 256, (n, rows, cols, 3), dtype=np.uint8)


def test_cached_facts_are_those_of_the_network(
    inception: Classifier, googlenet: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cached facts of each network are equal without tracing it; another stride has its own."""
    keys = [(inception, 16), (inception, 56), (googlenet, 16)]
    expected = {key: network.describe(*key) for key in keys}
    assert {key: scorer.describe(*key) for key in expected} == expected
    monkeypatch.setattr(network, "describe", lambda *_: pytest.fail("it was traced, and its facts are kept"))
    assert {key: scorer.describe(*key) for key in expected} == expected


def frame(stride: int, halo: int, convention: geometry.Convention = "centred") -> Frame:
    return Frame(convention, 4000, 4000, 1.0, 0.25, 224, 224, stride, halo, 3, 3, 0, 0, 18, 18)


def pixels_of(about: Frame, block: Block = BLOCK) -> np.ndarray:
    return images(1, about.block_px(block.rows), about.block_px(block.cols))[0]


def naive(classifier: Classifier, about: Frame, block: Block, pixels: np.ndarray) -> np.ndarray:
    """Return the score of every window of every tissue tile, run alone at its place on the heatmap."""
    m, side, stride = about.cells_per_tile, about.window_px, about.stride_px
    found = np.empty((len(block.tissue), m, m), np.float32)
    for n, index in enumerate(block.tissue):
        for i in range(m):
            for j in range(m):
                centre_x = about.halo_px + index % block.cols * about.tile_px + j * stride + stride // 2
                centre_y = about.halo_px + index // block.cols * about.tile_px + i * stride + stride // 2
                x, y = centre_x - side // 2, centre_y - side // 2
                found[n, i, j] = predict(classifier, pixels[None, y : y + side, x : x + side])[0]
    return found


@pytest.mark.parametrize("backend", ["torch", "openvino", "onnxruntime"])
def test_windows_equal_a_naive_loop(inception: Classifier, backend: str) -> None:
    """The tissue tiles of a block are scored, with batches that span rows and tiles."""
    about = frame(112, 56)
    pixels = pixels_of(about)
    made = scorer.make_scorer(inception, PLAIN._replace(stride_px=112, batch=7, backend=backend), threads=1)
    found = made.score(about, [(BLOCK, pixels)], untimed).prob
    assert found.std() > 1e-4
    np.testing.assert_allclose(found, naive(inception, about, BLOCK, pixels), atol=5e-6)


@pytest.mark.parametrize("step", [2, 4])
def test_refinement_runs_all_windows_where_a_coarse_score_is_high(inception: Classifier, step: int) -> None:
    """Tiles above the threshold equal the naive loop; in others the middle window fills its surroundings."""
    about = frame(56, 84)
    pixels = pixels_of(about)
    expected = naive(inception, about, BLOCK, pixels)
    places = np.arange(4) // step * step + step // 2
    coarse = expected[:, places][:, :, places]
    tops = np.sort(coarse.max(axis=(1, 2)))
    refine = float((tops[1] + tops[2]) / 2)
    choice = PLAIN._replace(batch=3, refine=refine, refine_from_px=56 * step)
    found = scorer.make_scorer(inception, choice, threads=1).score(about, [(BLOCK, pixels)] * 2, untimed)
    near = coarse.max(axis=(1, 2)) >= refine
    assert near.tolist().count(True) == 2
    refined = np.where(near[:, None, None], expected, coarse)
    np.testing.assert_allclose(found.prob, np.concatenate([refined] * 2), atol=5e-6)
    assert found.windows == 2 * (2 * 16 + 2 * (4 // step) ** 2)


def test_refinement_keeps_coarse_scores_where_none_is_high(inception: Classifier) -> None:
    """In most tissue there are only coarse scores."""
    about = frame(56, 84)
    choice = PLAIN._replace(batch=3, refine=1.0, refine_from_px=112)
    found = scorer.make_scorer(inception, choice, threads=1).score(about, [(BLOCK, pixels_of(about))], untimed)
    coarse = found.prob[:, ::2, ::2]
    assert coarse.min() > 0
    np.testing.assert_array_equal(found.prob, coarse.repeat(2, axis=1).repeat(2, axis=2))
    assert found.windows == coarse.size


@pytest.mark.parametrize(("halo", "backend"), [(104, "torch"), (104, "openvino"), (112, "torch"), (200, "torch")])
def test_dense_equals_windows_wherever_the_region_begins(inception: Classifier, halo: int, backend: str) -> None:
    """A network without padding gives the same scores except for rounding, also with a wider halo."""
    about = frame(16, halo)
    block = Block(0, 0, 2, 1, (1,))
    pixels = pixels_of(about, block)
    choice = PLAIN._replace(stride_px=16, halo_px=halo)
    expected = scorer.make_scorer(inception, choice, threads=1).score(about, [(block, pixels)], untimed).prob
    found = (
        scorer.make_scorer(inception, choice._replace(engine="dense", backend=backend), threads=1)
        .score(about, [(block, pixels)], untimed)
        .prob
    )
    assert found.shape == (1, 14, 14)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("stride", [8, 32, 112])
def test_dense_equals_a_naive_loop_at_other_strides(inception: Classifier, stride: int) -> None:
    """The maps of tiles are in their places at strides finer and coarser than the network's 16 px."""
    about, block = frame(stride, 112), Block(0, 0, 2, 2, (1, 2))
    if stride == 8:
        block = Block(0, 0, 1, 1, (0,))
    pixels = pixels_of(about, block)
    choice = PLAIN._replace(engine="dense", stride_px=stride)
    found = scorer.make_scorer(inception, choice, threads=1).score(about, [(block, pixels)], untimed).prob
    np.testing.assert_allclose(found, naive(inception, about, block, pixels), atol=1e-5)


@pytest.mark.parametrize(
    "choice",
    [
        PLAIN._replace(engine="dense"),
        PLAIN,
        PLAIN._replace(refine=0.5, refine_from_px=112),
        PLAIN._replace(refine=1.0, refine_from_px=112),
    ],
    ids=lambda one: f"{one.engine} {one.refine or ''}",
)
def test_a_cropped_block_has_the_scores_of_the_whole(inception: Classifier, choice: Choice) -> None:
    """Cells that are scored have the same scores though less is read, and the others have none."""
    about, whole = frame(56, 84), Block(0, 0, 2, 2, (0, 1, 3))
    squares = np.zeros((3, 4, 4), np.bool_)
    squares[0, 2:, 2:], squares[1, 2:, :2], squares[2, :2, :2] = True, True, True
    tissue = np.array([[1, 1], [0, 1]], np.bool_)
    (cropped,) = blocks_at(tissue, [(0, 0, 2, 2)], squares, crop=True)
    assert cropped.crop == (2, 2, 4, 4)
    pixels = pixels_of(about, whole)
    (x, y), (rows, cols) = np.subtract(origin_px(about, cropped), origin_px(about, whole)), size_px(about, cropped)
    engine = scorer.make_scorer(inception, choice, threads=1)
    expected = engine.score(about, [(whole, pixels)], untimed)
    found = engine.score(about, [(cropped, pixels[y : y + rows, x : x + cols])], untimed)
    assert np.array_equal(~np.isnan(found.prob), squares)
    np.testing.assert_allclose(found.prob[squares], expected.prob[squares], atol=1e-6)
    assert found.windows < expected.windows


def test_sharing_up_to_a_layer_lies_between(googlenet: Classifier) -> None:
    """GoogLeNet pads, so windows that share only a stem are nearer to single windows than fully shared ones."""
    about = frame(56, 84 + 96)
    block = Block(0, 0, 1, 1, (0,))
    pixels = np.repeat(np.repeat(pixels_of(about, block)[::8, ::8], 8, axis=0), 8, axis=1)[: about.block_px(1)]
    choice = PLAIN._replace(engine="dense", context_px=96, exact=False)
    expected = naive(googlenet, about, block, pixels)
    apart = {
        cut: np.abs(
            scorer.make_scorer(googlenet, choice._replace(share_until=cut), threads=1)
            .score(about, [(block, pixels)], untimed)
            .prob
            - expected
        ).mean()
        for cut in ("", "pool3", "pool1")
    }
    assert 0 < apart["pool1"] < apart["pool3"] < apart[""]


def test_int8_is_calibrated_and_near(inception: Classifier) -> None:
    """Quantised on regions of the block itself, the scores are near those in fp32, but differ."""
    about = frame(16, 104)
    block = Block(0, 0, 2, 1, (0, 1))
    pixels = pixels_of(about, block)
    choice = PLAIN._replace(engine="dense", stride_px=16, backend="openvino")
    data = scorer.quantise(inception, choice, [scoring.calibration_sample(about, block, pixels, choice)])
    expected = scorer.make_scorer(inception, choice, threads=1).score(about, [(block, pixels)], untimed).prob
    small = scorer.make_scorer(inception, choice._replace(precision="int8"), threads=1, quantised=data)
    found = small.score(about, [(block, pixels)], untimed).prob
    assert 0 < np.abs(found - expected).mean() < 0.02


def small(input_px: int) -> Classifier:
    """A network of one convolution with a window of 16 px."""
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 5, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    return as_classifier(network, card(16, input_px))


DENSE = PLAIN._replace(engine="dense")
BACKENDS = ("torch", "openvino", "onnxruntime")


@pytest.mark.parametrize(
    "choice",
    [
        *(one._replace(backend=name) for one in (DENSE, PLAIN) for name in BACKENDS),
        DENSE._replace(share_until="1"),
        PLAIN._replace(batch=3, refine=0.5, refine_from_px=112),
        PLAIN._replace(batch=3, refine=1.0, refine_from_px=112),
    ],
    ids=lambda one: f"{one.engine} {one.backend} {one.share_until}{one.refine or ''}",
)
def test_further_classes_stand_beside_the_score(choice: Choice) -> None:
    """A second class is mapped in the same pass, and the bits of the positive score stay what they are."""
    about = frame(56, choice.halo_px)._replace(window_px=16)
    block, alone = Block(0, 0, 1, 2, (1,)), small(16)
    pixels = pixels_of(about, block)
    both = replace(alone, outputs=alone.outputs._replace(maps=(0,)))
    expected, found = (
        scorer.make_scorer(each, choice, threads=1).score(about, [(block, pixels)] * 2, untimed)
        for each in (alone, both)
    )
    assert expected.maps.shape == (0, *expected.prob.shape)
    np.testing.assert_array_equal(found.prob, expected.prob)
    assert found.windows == expected.windows
    np.testing.assert_allclose(found.maps, 1 - expected.prob[None], atol=1e-6)


def windows(n: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize("input_px", [16, 24], ids=["as they are", "resized"])
@settings(deadline=None, max_examples=20)
@given(batch=st.integers(1, 20), n=st.integers(0, 23))
def test_a_score_does_not_depend_on_other_windows(input_px: int, batch: int, n: int) -> None:
    """With one batch size, the first windows alone have the same bits as among others."""
    classifier = small(input_px)
    made = scorer.make_scorer(classifier, PLAIN._replace(batch=batch), threads=1)
    every = made.run(windows(23), untimed)
    np.testing.assert_array_equal(made.run(windows(n), untimed), every[:n])
    np.testing.assert_allclose(every, predict(classifier, windows(23)), atol=1e-6)


@pytest.mark.parametrize("how", ["torch", "pillow"])
@pytest.mark.parametrize("backend", installed_backends())
def test_all_backends_see_the_same_resized_windows(backend: str, how: Resize) -> None:
    """Scores of the two ways differ by more than those of two backends."""
    classifier = replace(small(23), resize=how)
    made = scorer.make_scorer(classifier, PLAIN._replace(backend=backend), threads=1)
    np.testing.assert_allclose(made.run(windows(9), untimed), predict(classifier, windows(9)), atol=2e-7)
    other = predict(replace(classifier, resize="torch" if how == "pillow" else "pillow"), windows(9))
    assert np.abs(other - predict(classifier, windows(9))).max() > 1e-6


class _Overflow(nn.Module):
    """A module that returns NaN for windows that begin with a black pixel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = x[:, :, 0, 0].sum(dim=1)
        return torch.stack([start, torch.where(start > -6, start, torch.nan)], dim=1)


def test_a_score_that_is_not_finite_is_an_error() -> None:
    """NaN never becomes a score."""
    bad = np.full((3, 16, 16, 3), 255, np.uint8)
    bad[1, 0, 0] = 0
    made = scorer.make_scorer(as_classifier(_Overflow(), card(16, 16)), PLAIN, threads=1)
    with pytest.raises(InputError, match="no finite probability for window 1 of a batch"):
        made.run(bad, untimed)


def test_what_only_windows_can_do_is_refused(googlenet: Classifier) -> None:
    """int8 needs the whole network, and the message names a layer that does not exist."""
    choice = PLAIN._replace(engine="dense", backend="openvino", share_until="pool3", precision="int8")
    with pytest.raises(InputError, match="int8 is not supported"):
        scorer.make_scorer(googlenet, choice, threads=1, quantised=b"")
    with pytest.raises(InputError, match="pool9"):
        densify(googlenet, 16, share_until="pool9")


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
@pytest.mark.parametrize(
    ("choice", "input_px"),
    [
        (PLAIN, 16),
        (PLAIN, 23),
        (PLAIN._replace(engine="dense", stride_px=8), 16),
        (PLAIN._replace(engine="dense", stride_px=8, share_until="1"), 16),
    ],
    ids=["window", "resized", "dense", "partly"],
)
def test_a_scorer_from_the_cache_gives_the_same_bits(choice: Choice, input_px: int, backend: str) -> None:
    """It needs neither the classifier nor PyTorch."""
    choice = choice._replace(backend=backend)
    key = prepared.model_key(card(16, input_px), ())
    assert prepared.find(key, choice, threads=1) is None
    made = scorer.make_scorer(small(input_px), choice, threads=1, keep_as=key)
    found = prepared.find(key, choice, threads=1)
    assert type(found) is type(made)
    inputs = windows(11) if choice.engine == "window" else images(1, 64, 72)[0]
    np.testing.assert_array_equal(found.run(inputs, untimed), made.run(inputs, untimed))


def test_a_scorer_is_found_only_where_all_that_decides_it_is_the_same() -> None:
    """Another card, class, choice or number of threads is another one, and so is one that lacks its graph."""
    choice, key = PLAIN._replace(backend="openvino"), prepared.model_key(card(16, 16), ())
    scorer.make_scorer(small(16), choice, threads=1, keep_as=key)
    verified = card(16, 16).model_copy(update={"probe": (Probe(seed=0, probabilities=(0.5, 0.5)),)})
    assert prepared.find(prepared.model_key(verified, ()), choice, threads=1) is None
    assert prepared.find(prepared.model_key(card(16, 16), (0,)), choice, threads=1) is None
    assert prepared.find(key, choice._replace(batch=9), threads=1) is None
    assert prepared.find(key, choice, threads=2) is None
    assert prepared.find(key, choice._replace(halo_px=112), threads=1), "blocks have other sides, the graph is the same"
    assert prepared.find(key, choice, threads=1)
    folder = cache_folder()
    assert folder
    max(folder.iterdir(), key=lambda path: path.stat().st_size).unlink()
    assert prepared.find(key, choice, threads=1) is None
