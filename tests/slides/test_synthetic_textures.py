"""Quilted tissue has no visible seams, depends on the seed only, and has the colours of its appearance."""

import numpy as np
import pytest
from numpy.typing import NDArray

from wsiflow.slides.synthetic import textures
from wsiflow.slides.synthetic.textures import OVERLAP_PX, PIECE_PX, Appearance

PITCH_PX = PIECE_PX - OVERLAP_PX
APPEARANCE = Appearance((0.55, 0.7, 0.4), (0.15, 0.9, 0.3), (1.0, 1.0), (240.0, 238.0, 242.0), 0.6, 1.0)


@pytest.fixture(scope="module")
def pieces() -> NDArray[np.uint8]:
    """Return images of round nuclei on a pale ground, uint8 (6, 256, 256, 2)."""
    import cv2

    rng = np.random.default_rng(4)
    found = []
    for _ in range(6):
        picture = np.full((256, 256, 2), 40, np.uint8)
        for x, y in rng.integers(0, 256, (220, 2)):
            cv2.circle(picture, (int(x), int(y)), int(rng.integers(6, 10)), (int(rng.integers(120, 200)), 60), -1)
        found.append(cv2.GaussianBlur(picture, (0, 0), 1.0))
    return np.stack(found)


def steepness(field: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the differences between neighbours in a row, (rows, cols - 1)."""
    return np.abs(np.diff(field[..., 0].astype(np.float64), axis=1))


def by_phase(field: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the mean differences between neighbours by their distance from the begin of a piece."""
    columns = steepness(field).mean(axis=0)
    columns = np.append(columns, columns[PITCH_PX - 1])  # the last column has no neighbour
    return np.asarray(columns.reshape(-1, PITCH_PX).mean(axis=0), np.float64)


def test_the_same_seed_gives_the_same_field(pieces: NDArray[np.uint8]) -> None:
    """The same seed gives the same field, and another seed another."""
    region = np.ones((400, 500), np.bool_)
    first, again, other = (textures.quilt(pieces, region, seed) for seed in (1, 1, 2))
    assert first.shape == (400, 500, 2)
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.3


def test_the_region_is_covered(pieces: NDArray[np.uint8]) -> None:
    """The region is covered, and places far from it are empty."""
    region = np.zeros((1200, 1200), np.bool_)
    region[700:760, 100:900] = True
    field = textures.quilt(pieces, region, 3)
    assert field[region].min() > 0
    assert not field[:400].any()


def test_no_seam_shows(pieces: NDArray[np.uint8]) -> None:
    """Neighbours differ as much at joints as inside pieces; with pieces pasted side by side they differ more."""
    side = 9 * PITCH_PX
    field = textures.quilt(pieces, np.ones((side, side), np.bool_), 5)
    rng = np.random.default_rng(1)
    pasted = np.concatenate(
        [
            np.concatenate([textures._crop(pieces, rng)[:PITCH_PX, :PITCH_PX] for _ in range(9)], axis=1)
            for _ in range(9)
        ]
    )
    quilted, naive = (by_phase(one) for one in (field, pasted))
    assert naive.max() > 1.8 * np.median(naive), "the measure must see a seam"
    assert quilted.max() < 1.25 * np.median(quilted)
    meeting, within = quilted[:OVERLAP_PX].mean(), quilted[OVERLAP_PX:].mean()
    assert meeting == pytest.approx(within, rel=0.06)


def test_a_cut_is_the_path_of_least_sum() -> None:
    """The result is compared with all paths of a small field."""
    import itertools

    gap = np.random.default_rng(0).integers(0, 50, (5, 4)).astype(np.int32)
    paths = [path for path in itertools.product(range(4), repeat=5) if np.abs(np.diff(path)).max() <= 1]
    least = min(sum(gap[row, col] for row, col in enumerate(path)) for path in paths)
    found = textures._cut(gap)
    assert sum(gap[row, col] for row, col in enumerate(found)) == least
    assert np.abs(np.diff(found)).max() <= 1


@pytest.mark.parametrize("purity", [0.3, 0.6, 1.0])
def test_share_of_tumour(purity: float) -> None:
    """The share is the purity deep inside a lesion, less at the rim, and 0 outside."""
    lesion = np.zeros((1000, 1000), np.uint8)
    lesion[100:900, 100:900] = 255
    shares = np.stack([textures.share_of_tumour(lesion, purity, seed) for seed in range(8)])
    assert not shares[:, lesion == 0].any()
    assert shares[:, 250:750, 250:750].mean() == pytest.approx(purity, abs=0.06)
    assert shares[:, 110:130, 110:890].mean() < 0.7 * purity


def test_a_lesion_at_the_edge_of_its_window_thins_out_there_too() -> None:
    """The border of the window counts as the outline of a lesion that reaches it."""
    share = textures.share_of_tumour(np.full((300, 300), 255, np.uint8), 1.0, 1)
    assert share[0].mean() < 0.5
    assert share[140:160, 140:160].mean() > 0.95


def test_uniform_field_is_uniform() -> None:
    """Each tenth of the range of values has a tenth of the area."""
    counts, _ = np.histogram(textures.uniform_field((900, 1100), 40, 2), bins=10, range=(0, 1))
    np.testing.assert_allclose(counts / counts.sum(), 0.1, atol=0.01)


def test_colours_follow_the_appearance() -> None:
    """Without stain there is glass; one unit of haematoxylin absorbs according to the Beer-Lambert law."""
    codes = np.zeros((64, 64, 2), np.uint8)
    clear = APPEARANCE._replace(noise=0.0)
    np.testing.assert_allclose(textures.coloured(codes, clear, 0)[32, 32], APPEARANCE.glass, atol=1)
    codes[..., 0] = 85
    expected = np.array(APPEARANCE.glass) * np.exp(-np.array(APPEARANCE.haematoxylin))
    np.testing.assert_allclose(textures.coloured(codes, clear, 0)[32, 32], expected, atol=1)
    strong = clear._replace(strengths=(2.0, 1.0))
    assert (textures.coloured(codes, strong, 0)[32, 32] < expected - 20).all()


def test_mixing_is_linear_in_the_share() -> None:
    """A share of one half gives the mean."""
    under, over = np.full((4, 4, 2), 10, np.uint8), np.full((4, 4, 2), 110, np.uint8)
    assert (textures.mixed(under, over, np.full((4, 4), 0.5, np.float32)) == 60).all()
