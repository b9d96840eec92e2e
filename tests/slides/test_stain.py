"""Stain: fits recover the true colours, transforms equal their formulas, and no failure is silent."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image
from scipy.optimize import nnls
from sklearn.decomposition import DictionaryLearning

from wsiflow.errors import InputError
from wsiflow.slides.stain import density, pixels, reinhard, vahadane
from wsiflow.slides.stain.density import CODE_PENALTY, density_method, density_table, stain_codes
from wsiflow.slides.stain.fits import LEAST_SINE, DensityFit, LabFit
from wsiflow.slides.stain.methods import METHODS as TABLE
from wsiflow.slides.stain.params import StainFit, StainParams, read_fit
from wsiflow.slides.stain.pixels import sample, stratified_indices
from wsiflow.slides.stain.transfer import fit, fit_target, normalise, normalise_block, normalise_patch
from wsiflow.slides.synthetic import dataset
from wsiflow.slides.synthetic.tissue import Stain, render

CONF = Path(__file__).parents[2] / "conf" / "stain"
METHODS = ["reinhard", "macenko", "vahadane"]
DENSITIES = ["macenko", "vahadane"]
Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]

H, E = np.array([0.62, 0.70, 0.35]), np.array([0.15, 0.95, 0.28])
STAINS = np.stack([H / np.linalg.norm(H), E / np.linalg.norm(E)])


def params(method: str, **changes: object) -> StainParams:
    """Return the default settings with some replaced."""
    return StainParams(**(yaml.safe_load((CONF / f"{method}.yaml").read_text()) | changes))


def angle(a: Floats | tuple[float, ...], b: Floats | tuple[float, ...]) -> float:
    """Return the angle between two vectors in degrees."""
    cosine = np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
    return float(np.degrees(np.arccos(min(1.0, cosine))))


def painted(codes: Floats, stains: Floats = STAINS, white: float = 255.0) -> Pixels:
    """Return pixels, shape (n, 3), with known amounts of stain, shape (n, 2)."""
    return np.rint(white * np.exp(-codes @ stains)).clip(0, 255).astype(np.uint8)


def amounts(n: int = 60_000, seed: int = 0) -> Floats:
    """Return amounts as in tissue: nuclei with little eosin, cytoplasm with little haematoxylin, 10 % glass."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, n, p=[0.4, 0.5, 0.1])
    means = np.array([[1.0, 0.1], [0.1, 0.7], [0.0, 0.0]])[kind]
    return np.asarray(rng.gamma(4, means / 4 + 1e-9))


def rainbow(rows: int = 301, cols: int = 203, seed: int = 0) -> Pixels:
    """Return all kinds of colours, in a shape that is not a multiple of a strip."""
    return np.random.default_rng(seed).integers(0, 256, (rows, cols, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def scanners(shared_data: Path) -> dict[str, Pixels]:
    """Return patches of one slide of each scanner, shape (n, 256, 256, 3)."""
    folder = shared_data / "patches" / "dldp_256"
    return {
        slide: np.stack([np.array(Image.open(p).convert("RGB")) for p in sorted(folder.glob(f"*/{slide}_*.png"))][:20])
        for slide in ("tumor_064", "tumor_073")
    }


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Stain, Pixels]]:
    """Return tissue tiles, shape (n, 128, 128, 3), of synthetic slides, and the stains of these slides."""
    slides = []
    for seed in range(4):
        spec = dataset.plan_slide("micro", width_px=4096, height_px=4096, seed=seed)
        at = range(256, 4096, 768)
        tiles = np.stack([render(spec, x, y, 128, 128) for x in at for y in at])
        slides.append((spec.stain, tiles[np.ptp(tiles, axis=3).mean(axis=(1, 2)) > 15]))
    return slides


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of OpenCV's threads after a test."""
    before = cv2.getNumThreads()
    yield
    cv2.setNumThreads(before)


# Stain vectors


@pytest.mark.parametrize(("method", "limit"), [("macenko", 4.0), ("vahadane", 6.0)])
@pytest.mark.parametrize("white", [255.0, 232.0])
def test_known_stains_are_recovered(method: str, limit: float, white: float) -> None:
    """This holds for any glass; a sparse dictionary is slightly inside the true pair, as its codes are shrunk."""
    found = fit(painted(amounts(), white=white), params(method))
    assert isinstance(found, DensityFit)
    assert found.white == pytest.approx(white, abs=1)
    assert angle(found.haematoxylin, STAINS[0]) < limit
    assert angle(found.eosin, STAINS[1]) < limit


@pytest.mark.parametrize("method", DENSITIES)
def test_haematoxylin_comes_first(method: str) -> None:
    """The vectors are ordered by their red density, whatever their amounts."""
    for share in (0.2, 5.0):
        found = fit(painted(amounts() * [share, 1.0]), params(method))
        assert isinstance(found, DensityFit)
        assert found.haematoxylin[0] > found.eosin[0]
        assert angle(found.haematoxylin, STAINS[0]) < angle(found.haematoxylin, STAINS[1])


def test_strengths_are_the_amounts_of_the_darkest_percent() -> None:
    """With Macenko's vectors the strengths are near the true ones of the tissue; glass does not dilute them."""
    codes = amounts()
    few = fit(painted(codes), params("macenko"))
    glassy = fit(np.concatenate([painted(codes), np.full((60_000, 3), 255, np.uint8)]), params("macenko"))
    assert isinstance(few, DensityFit)
    assert isinstance(glassy, DensityFit)
    dark = codes[codes.sum(axis=1) > 0.5]
    np.testing.assert_allclose(few.strengths, np.percentile(dark, 99, axis=0), rtol=0.12)
    np.testing.assert_allclose(glassy.strengths, few.strengths, rtol=0.03)


@pytest.mark.parametrize("method", METHODS)
def test_drawn_slides_come_together(method: str, drawn: list[tuple[Stain, Pixels]]) -> None:
    """For blurred, noisy synthetic slides the stains are found, and the mean colours end twice as close."""
    settings_ = params(method)
    means = []
    for colours, tiles in drawn:
        found = fit(sample(tiles, None, settings_.sample_px), settings_)
        out = normalise(tiles.reshape(-1, 128, 3), found, settings_.target_fit)
        means.append([x.reshape(-1, 3)[x.reshape(-1, 3).mean(axis=1) < 205].mean(axis=0) for x in (tiles, out)])
        if isinstance(found, DensityFit):
            # Less than a twentieth of a tile inside the tissue is glass, so its white is slightly darker.
            assert -8 < found.white - np.mean(colours.glass) < 4
            assert angle(found.haematoxylin, colours.haematoxylin) < 3
            assert angle(found.eosin, colours.eosin) < 9
    raw, normalised = np.linalg.norm(np.std(means, axis=0), axis=1)
    assert normalised < raw / 2


def dictionary_objective(density: Floats, stains: Floats) -> float:
    """Return the objective that a dictionary minimises, with the best codes for it."""
    codes = np.array([lasso_by_nnls(x, stains, vahadane.DICTIONARY_PENALTY) for x in density.T])
    missed = density.T - codes @ stains
    return float(0.5 * np.square(missed).sum() + vahadane.DICTIONARY_PENALTY * codes.sum()) / density.shape[1]


@pytest.mark.filterwarnings("ignore:Objective did not converge")
@pytest.mark.parametrize("kind", ["painted", "template"])
def test_the_dictionary_is_as_good_as_another_solvers(kind: str, request: pytest.FixtureRequest) -> None:
    """Scikit-learn's coordinate descent from random starts finds no lower objective, and the same vectors."""
    pixels = painted(amounts(750))
    if kind == "template":
        folder = request.getfixturevalue("shared_data") / "patches" / "dldp_256"
        pixels = np.array(Image.open(folder / "tumor_st.png").convert("RGB")).reshape(-1, 3)[::160]
    density = density_table(255.0)[pixels[pixels.min(axis=1) < 200].T]
    ours = vahadane.vahadane_vectors(density, params("vahadane").iterations)
    best = min(
        (
            DictionaryLearning(
                2, alpha=vahadane.DICTIONARY_PENALTY, fit_algorithm="cd", transform_algorithm="lasso_cd",
                positive_code=True, positive_dict=True, random_state=seed, max_iter=150, tol=1e-9,
            ).fit(density.T).components_
            for seed in range(2)
        ),
        key=lambda stains: dictionary_objective(density, stains),
    )  # fmt: skip
    best = best[np.argsort(-best[:, 0])]
    assert dictionary_objective(density, ours) <= dictionary_objective(density, best) * (1 + 1e-4)
    assert max(angle(a, b) for a, b in zip(ours, best, strict=True)) < 1


def test_the_dictionary_has_converged(scanners: dict[str, Pixels]) -> None:
    """The default number of iterations is as good as twenty times as many."""
    for tiles in scanners.values():
        few, many = (fit(tiles[::4], params("vahadane", sample_px=10_000, iterations=n)) for n in (100, 2000))
        assert isinstance(few, DensityFit)
        assert isinstance(many, DensityFit)
        assert angle(few.haematoxylin, many.haematoxylin) < 0.1
        assert angle(few.eosin, many.eosin) < 0.1


# Codes


def lasso_by_nnls(density: Floats, stains: Floats, penalty: float) -> Floats:
    """Solve the non-negative lasso of a pixel as least squares, by completing squares, with an active-set solver."""
    root = np.linalg.cholesky(stains @ stains.T)
    return np.asarray(nnls(root.T, np.linalg.solve(root, stains @ density - penalty))[0])


def lasso_by_descent(density: Floats, stains: Floats, penalty: float) -> Floats:
    """Solve the non-negative lasso of a pixel by coordinate descent."""
    codes = np.zeros(2)
    for _ in range(5000):
        for k in (0, 1):
            codes[k] = max(0.0, stains[k] @ (density - codes[1 - k] * stains[1 - k]) - penalty)
    return codes


@settings(max_examples=60, deadline=None)
@given(
    stains=hnp.arrays(np.float64, (2, 3), elements=st.floats(0.01, 1)),
    density=hnp.arrays(np.float64, 3, elements=st.floats(0, 5.6)),
    penalty=st.sampled_from([CODE_PENALTY, vahadane.DICTIONARY_PENALTY, 0.0]),
)
def test_codes_solve_the_lasso(stains: Floats, density: Floats, penalty: float) -> None:
    """The closed form is the optimum that two other solvers find, for any valid pair of stains."""
    unit = stains / np.linalg.norm(stains, axis=1, keepdims=True)
    if np.linalg.norm(np.cross(unit[0], unit[1])) < LEAST_SINE:
        return
    codes = stain_codes(density[:, None], unit, penalty)[:, 0]
    np.testing.assert_allclose(codes, lasso_by_nnls(density, unit, penalty), atol=1e-6)
    np.testing.assert_allclose(codes, lasso_by_descent(density, unit, penalty), atol=1e-6)


def test_colours_outside_the_pair_get_no_negative_amount() -> None:
    """Blue ink and yellow would have negative amounts in a plain inverse."""
    density = np.array([[2.0, 0.0, 0.1], [0.5, 0.3, 0.1], [0.0, 2.0, 0.1]])
    assert (np.linalg.pinv(STAINS).T @ density).min() < -0.1
    assert stain_codes(density, STAINS, CODE_PENALTY).min() == 0


# Transforms


def plainly_normalised(rgb: Pixels, source: StainFit, target: StainFit) -> Pixels:
    """Return an image normalised by the formulas, pixel by pixel, in double precision."""
    if isinstance(source, LabFit) and isinstance(target, LabFit):
        lab = cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB).astype(np.float64)
        moved = (lab - source.mean) / source.std * target.std + target.mean
        return np.asarray(cv2.cvtColor(np.rint(moved.clip(0, 255)).astype(np.uint8), cv2.COLOR_LAB2RGB), np.uint8)
    assert isinstance(source, DensityFit)
    assert isinstance(target, DensityFit)
    density = -np.log(np.clip(rgb.reshape(-1, 3) * 255.0 / source.white, 1, 255) / 255)
    pair, other = (np.array([f.haematoxylin, f.eosin]) for f in (source, target))
    codes = np.array([lasso_by_nnls(x, pair, CODE_PENALTY) for x in density])
    codes *= np.array(target.strengths) / source.strengths
    return np.rint((255 * np.exp(-codes @ other)).clip(0, 255)).astype(np.uint8).reshape(rgb.shape)


@cache
def fits(method: str) -> tuple[StainFit, StainFit]:
    """Return the fit of painted tissue on grey glass, and the default target."""
    settings_ = params(method)
    return fit(painted(amounts(), white=236), settings_), settings_.target_fit


@pytest.mark.parametrize("method", METHODS)
def test_the_fast_transform_is_the_formula(method: str) -> None:
    """For any colour the result differs from double precision by at most one grey level, and rarely."""
    source, target = fits(method)
    rgb = np.concatenate([rainbow(60, 80), painted(amounts(4800)).reshape(60, 80, 3)])
    away = np.abs(normalise(rgb, source, target).astype(int) - plainly_normalised(rgb, source, target))
    assert away.max() <= 1
    assert away.mean() < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_a_pixel_is_the_same_wherever_it_lies(method: str) -> None:
    """Any crop, rotation or view of a block gives the same bits: strips have no influence."""
    source, target = fits(method)
    rgb = rainbow()
    whole = normalise(rgb, source, target)
    for rows, cols in ((slice(0, 1), slice(0, 1)), (slice(3, 9), slice(200, 203)), (slice(170, 301), slice(1, 150))):
        np.testing.assert_array_equal(normalise(rgb[rows, cols], source, target), whole[rows, cols])
    np.testing.assert_array_equal(normalise(rgb.transpose(1, 0, 2)[::-1], source, target).shape, (203, 301, 3))
    np.testing.assert_array_equal(
        normalise(rgb.transpose(1, 0, 2)[::-1], source, target), whole.transpose(1, 0, 2)[::-1]
    )


@pytest.mark.parametrize("method", METHODS)
def test_strips_are_not_seen(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of four pixels, which would all be last pixels of an array, give the same bits as a long one."""
    source, target = fits(method)
    rgb = rainbow()
    whole = normalise(rgb, source, target)
    for module in (pixels, density):
        monkeypatch.setattr(module, "STRIP_PX", 4)
    np.testing.assert_array_equal(normalise(rgb, source, target), whole)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("method", METHODS)
def test_bits_do_not_depend_on_threads(method: str) -> None:
    """Fit and transform, per slide and per patch, are equal with one and with four OpenCV threads."""
    rgb = painted(amounts(256 * 256)).reshape(256, 256, 3)
    seen = []
    for count in (1, 4):
        cv2.setNumThreads(count)
        source = fit(rgb, params(method))
        seen.append((source, normalise(rgb, source, params(method).target_fit).tobytes()))
        seen[-1] += (normalise_patch(rgb, params(method, per_patch=True)).tobytes(),)
        assert cv2.getNumThreads() == count
    assert seen[0] == seen[1]


@pytest.mark.parametrize("method", METHODS)
def test_the_callers_pixels_are_left_alone(method: str) -> None:
    """The input arrays are not modified."""
    rgb = painted(amounts(64 * 64)).reshape(64, 64, 3)
    rgb[0, 0] = 0
    before = rgb.copy()
    source = fit(rgb, params(method))
    normalise(rgb, source, params(method).target_fit)
    normalise_patch(rgb, params(method, per_patch=True))
    np.testing.assert_array_equal(rgb, before)


@pytest.mark.parametrize("method", METHODS)
def test_a_slide_normalised_to_itself_stays(method: str) -> None:
    """Tissue of two stains on white changes by at most two grey levels, by the lasso's shrinkage or by 8 bits of LAB.

    A fitted pair lies inside of the true one: pixels of a single stain lose what is outside, a tenth of them more.
    """
    rgb = painted(amounts()).reshape(200, 300, 3)
    fitted = fit(rgb, params(method))
    away = np.abs(normalise(rgb, fitted, fitted).astype(int) - rgb)
    assert np.percentile(away, 99 if method == "reinhard" else 90) <= 2
    if isinstance(fitted, DensityFit):
        true = replace(fitted, haematoxylin=tuple(STAINS[0]), eosin=tuple(STAINS[1]))
        assert np.abs(normalise(rgb, true, true).astype(int) - rgb).max() <= 2


@pytest.mark.parametrize("method", DENSITIES)
def test_glass_becomes_white(method: str) -> None:
    """Pixels as light as the slide's white or lighter become exactly 255; slightly darker ones almost."""
    source, target = fits(method)
    glass = np.arange(230, 256, dtype=np.uint8).repeat(3).reshape(1, -1, 3)
    out = normalise(glass, source, target)[0]
    assert (out[6:] == 255).all()
    assert out.min() >= 245


def test_reinhard_gives_the_targets_mean_and_spread() -> None:
    """This holds for tissue in LAB if nothing is clipped; the target is inside the gamut."""
    rgb = painted(amounts()[amounts().sum(axis=1) > 0.4]).reshape(1, -1, 3)
    source = reinhard.fit_lab(rgb[0])
    target = LabFit("reinhard", (130.0, 150.0, 120.0), (20.0, 4.0, 3.0))
    out = reinhard.fit_lab(normalise(rgb, source, target)[0])
    np.testing.assert_allclose(out.mean, target.mean, atol=0.5)
    np.testing.assert_allclose(out.std, target.std, atol=0.5)


@pytest.mark.parametrize("method", METHODS)
def test_two_scanners_come_closer(method: str, scanners: dict[str, Pixels]) -> None:
    """The mean colours of tissue on two real slides, 43 grey levels apart, end within 12."""
    settings_ = params(method)
    means = []
    for tiles in scanners.values():
        source = fit(sample(tiles, None, settings_.sample_px), settings_)
        out = normalise(tiles.reshape(-1, 256, 3), source, settings_.target_fit)
        means.append([x.reshape(-1, 3)[x.reshape(-1, 3).mean(axis=1) < 210].mean(axis=0) for x in (tiles, out)])
    raw, normalised = (float(np.linalg.norm(a - b)) for a, b in zip(*means, strict=True))
    assert raw > 35
    assert normalised < 12


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=25, deadline=None)
@given(rgb=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40).map(lambda s: (*s, 3))))
def test_any_pixels_can_be_normalised(method: str, rgb: Pixels) -> None:
    """With a fit the transform never fails on white, black, one colour or noise, and keeps shape and dtype."""
    source, target = fits(method)
    out = normalise(rgb, source, target)
    assert out.dtype == np.uint8
    assert out.shape == rgb.shape


def test_weak_stains_never_wrap_around() -> None:
    """At the largest allowed ratio, dark is 0 and white 255, and the order of greys is kept."""
    source = DensityFit("macenko", 255.0, tuple(STAINS[0]), tuple(STAINS[1]), (0.05, 0.05))
    target = DensityFit("macenko", 255.0, tuple(STAINS[0]), tuple(STAINS[1]), (100.0, 100.0))
    greys = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, -1, 3)
    out = normalise(greys, source, target)[0].astype(int)
    assert (out[0] == 0).all()
    assert (out[255] == 255).all()
    assert (np.diff(out, axis=0) >= 0).all()


def test_fits_of_two_methods_are_not_mixed() -> None:
    """Strengths and vectors of different methods have different meanings."""
    with pytest.raises(InputError, match="macenko cannot be mapped to a target of vahadane"):
        normalise(rainbow(2, 2), fits("macenko")[0], fits("vahadane")[1])


# Patch by patch


def plain_patch(rgb: Pixels, method: str, target: StainFit) -> Pixels:
    """Return a patch normalised by the reference's formulas, with the measured stains."""
    lab = cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB).astype(np.float64)
    lab[..., 0] = (255 * lab[..., 0] / np.percentile(lab[..., 0], 95)).clip(0, 255)
    light = cv2.cvtColor(np.rint(lab).astype(np.uint8), cv2.COLOR_LAB2RGB)
    if method != "vahadane":
        light = np.rint((light * 255.0 / np.percentile(light, 90)).clip(0, 255)).astype(np.uint8)
    if isinstance(target, LabFit):
        lab = cv2.cvtColor(light, cv2.COLOR_RGB2LAB).astype(np.float64)
        own = LabFit("reinhard", tuple(lab.mean(axis=(0, 1))), tuple(lab.std(axis=(0, 1))))
        return plainly_normalised(light, own, target)
    found = fit(rgb, params(method, per_patch=True))
    assert isinstance(found, DensityFit)
    density = -np.log(np.maximum(light.reshape(-1, 3), 1) / 255)
    pair = np.array([found.haematoxylin, found.eosin])
    codes = np.array([lasso_by_nnls(x, pair, CODE_PENALTY) for x in density])
    np.testing.assert_allclose(found.strengths, np.percentile(codes, 99, axis=0), rtol=1e-3)
    codes *= np.array(target.strengths) / np.percentile(codes, 99, axis=0)
    out = 255 * np.exp(-codes @ np.array([target.haematoxylin, target.eosin]))
    return np.rint(out.clip(0, 255)).astype(np.uint8).reshape(rgb.shape)


@pytest.mark.parametrize("method", METHODS)
def test_a_patch_is_normalised_by_the_references_formulas(method: str, scanners: dict[str, Pixels]) -> None:
    """The result uses the luminosity of the patch, its own fit, and the 99th percentiles of its amounts."""
    settings_ = params(method, per_patch=True)
    for tiles in scanners.values():
        patch = tiles[0][:96, :96]
        away = np.abs(normalise_patch(patch, settings_).astype(int) - plain_patch(patch, method, settings_.target_fit))
        assert away.max() <= 1
        assert away.mean() < 1e-2


def test_neighbours_agree_per_slide_and_not_per_patch(scanners: dict[str, Pixels]) -> None:
    """Two overlapping patches give their common pixels the same colours only with the fit of the slide."""
    row = np.concatenate(list(scanners["tumor_064"][:2]), axis=1)
    settings_ = params("vahadane", sample_px=10_000)
    source = fit(row, settings_)
    left, right = (normalise(row[:, cols], source, settings_.target_fit) for cols in (slice(0, 300), slice(100, 400)))
    np.testing.assert_array_equal(left[:, 100:], right[:, :200])
    alone = params("vahadane", sample_px=10_000, per_patch=True)
    left, right = (normalise_patch(row[:, cols], alone) for cols in (slice(0, 300), slice(100, 400)))
    assert np.abs(left[:, 100:].astype(int) - right[:, :200]).mean() > 1


# Failures


@pytest.mark.parametrize("per_patch", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("pixels", "cause"),
    [
        (np.full((100, 100, 3), 255, np.uint8), "0 of 10000 pixels are tissue"),
        (np.full((100, 100, 3), 243, np.uint8), "0 of 10000 pixels are tissue"),
        (np.zeros((100, 100, 3), np.uint8), "black"),
        (np.empty((0, 3), np.uint8), "no pixels"),
        (np.concatenate([np.full((9000, 3), 250), np.full((1000, 3), (120, 60, 130))]).astype(np.uint8), "one colour"),
        (np.concatenate([np.full((9001, 3), 250), painted(amounts(999)) // 2]).astype(np.uint8), "1000 are needed"),
    ],
    ids=["white", "glass", "black", "nothing", "one-colour", "too-little"],
)
def test_what_has_no_colours_has_no_fit(method: str, per_patch: bool, pixels: Pixels, cause: str) -> None:
    """The error describes the pixels."""
    if per_patch and method == "reinhard" and cause == "one colour":
        pytest.skip("the reference measures over glass as well, which is a second colour")
    with pytest.raises(InputError, match=cause):
        fit(pixels, params(method, per_patch=per_patch))


@pytest.mark.parametrize("method", DENSITIES)
def test_a_slide_of_one_stain_has_no_fit(method: str) -> None:
    """Without eosin there is no second vector, only noise."""
    rng = np.random.default_rng(0)
    pixels = painted(amounts() * [1, 0]).astype(np.int16) + rng.integers(-1, 2, (60_000, 3), dtype=np.int16)
    with pytest.raises(InputError, match=r"too similar|one colour|one stain"):
        fit(pixels.clip(0, 255).astype(np.uint8), params(method))


@pytest.mark.parametrize("per_patch", [False, True])
def test_the_policy_is_followed(per_patch: bool) -> None:
    """``fail`` raises; ``raw`` returns the unchanged pixels and the reason."""
    white = np.full((50, 60, 3), 255, np.uint8)
    cause = "tissue" if per_patch else "no stain fit"
    with pytest.raises(InputError, match=cause):
        normalise_block(white, None, params("macenko", per_patch=per_patch))
    raw = normalise_block(white, None, params("macenko", per_patch=per_patch, on_failure="raw"))
    assert raw.rgb is white
    assert cause in raw.failure


def test_what_can_be_normalised_is() -> None:
    """With a fit, or per patch without one, there is no failure; ``none`` returns the same array."""
    rgb = painted(amounts(100 * 100)).reshape(100, 100, 3)
    settings_ = params("vahadane")
    source = fit(rgb, settings_)
    slide = normalise_block(rgb, source, settings_)
    patch = normalise_block(rgb, None, params("vahadane", per_patch=True))
    assert (slide.failure, patch.failure) == ("", "")
    np.testing.assert_array_equal(slide.rgb, normalise(rgb, source, settings_.target_fit))
    assert normalise_block(rgb, None, params("none")) == (rgb, "")


# Settings, fits and samples


@pytest.mark.parametrize("method", METHODS)
def test_the_target_that_ships_is_the_papers_template(method: str, shared_data: Path) -> None:
    """The numbers in ``conf/`` are those of ``tumor_st.png``."""
    template = np.array(Image.open(shared_data / "patches" / "dldp_256" / "tumor_st.png").convert("RGB"))
    settings_ = params(method)
    measured = fit_target(template, settings_)
    assert settings_.target is not None
    for way in ("per_slide", "per_patch"):
        numbers = [asdict(getattr(target, way)) for target in (measured, settings_.target)]
        assert numbers[0].keys() == numbers[1].keys()
        for name in numbers[0].keys() - {"method"}:
            np.testing.assert_allclose(numbers[0][name], numbers[1][name], rtol=1e-3, err_msg=name)


def test_a_method_is_a_record_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings may name it, and slides are fitted and normalised by it."""
    values = json.loads(params("macenko").model_dump_json().replace("macenko", "known"))
    with pytest.raises(ValueError, match="Input should be 'none', 'reinhard', 'macenko' or 'vahadane'"):
        StainParams(**values)
    monkeypatch.setitem(TABLE, "known", density_method("known", lambda _density, _params: STAINS))
    settings_ = StainParams(**values)
    found = fit(painted(amounts()), settings_)
    assert isinstance(found, DensityFit)
    assert angle(found.eosin, STAINS[1]) < 1e-3
    assert read_fit(asdict(found)) == found
    assert not normalise_block(rainbow(), found, settings_).failure


def test_a_target_of_another_method_is_refused() -> None:
    """Changing only the method would mix two kinds of numbers."""
    values = yaml.safe_load((CONF / "macenko.yaml").read_text())
    with pytest.raises(ValueError, match="target is of method macenko, but method is vahadane"):
        StainParams(**(values | {"method": "vahadane"}))
    with pytest.raises(ValueError, match="target is of method none, but method is macenko"):
        StainParams(**(values | {"target": None}))


@pytest.mark.parametrize("method", METHODS)
def test_a_fit_survives_json(method: str) -> None:
    """A fit is equal to the bit after writing and reading, as the tasks of a slide read it from one file."""
    source = fits(method)[0]
    assert read_fit(json.loads(json.dumps(asdict(source)))) == source


@pytest.mark.parametrize(
    ("change", "named"),
    [({"white": 0}, "white"), ({"eosin": [0.1, 0.2]}, "eosin"), ({"strengths": [1.0, 0.0]}, "strengths"),
     ({"strengths": [1.0, float("nan")]}, "strengths"), ({"colour": 1}, "colour"), ({"method": "magic"}, "magic")],
)  # fmt: skip
def test_a_damaged_fit_is_refused(change: dict[str, object], named: str) -> None:
    """The error names unknown, missing or invalid values."""
    with pytest.raises(InputError, match=named):
        read_fit(asdict(fits("macenko")[0]) | change)


@given(total=st.integers(0, 3000), count=st.integers(1, 1000))
def test_a_sample_is_stratified(total: int, count: int) -> None:
    """One index comes from each of equal ranges: none is repeated, and no gap is as long as two ranges."""
    chosen = stratified_indices(total, count)
    assert len(chosen) == min(total, count)
    assert (np.diff(chosen) > 0).all()
    if total > count:
        edges = np.concatenate([[0], chosen, [total - 1]])
        assert 0 <= chosen.min() <= chosen.max() < total
        assert np.diff(edges).max() <= 2 * total / count + 1


def test_a_sample_is_the_same_everywhere() -> None:
    """The sample is computed from the bits of PCG64, which no release of NumPy changes."""
    assert stratified_indices(1000, 8).tolist() == [79, 158, 255, 377, 601, 739, 825, 966]


def test_only_tissue_is_sampled() -> None:
    """With a mask only its pixels are sampled, and of a small slide all."""
    tiles = rainbow(60, 50).reshape(3, 20, 50, 3)
    tiles[..., 0] = 0
    tissue = np.random.default_rng(1).random((3, 20, 50)) < 0.3
    tiles[tissue, 0] = 255
    assert (sample(tiles, tissue, 200)[:, 0] == 255).all()
    assert len(sample(tiles, tissue, 200)) == 200
    assert len(sample(tiles, tissue, 100_000)) == tissue.sum()
    assert len(sample(tiles, None, 100)) == 100
