"""Measure how far dense maps differ from window maps over whole slides, and how this changes the FROC score.

wsiflow runs each case at least twice, once window by window in fp32, and the published heatmaps are compared cell by
cell. Synthetic slides have lesions, so their FROC score is given too; a real slide has only its heatmaps.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import product
from benchmarks.measuring import ResultTable, arguments, finish, machine, say
from wsiflow.model import certificate
from wsiflow.slides.synthetic.dataset import write_dataset

_QUANTILES = (0.5, 0.95, 0.99)


class NetworkCase(NamedTuple):
    """One network on one data set.

    Attributes:
        name: Name of the case in tables.
        card: Card of the network.
        dataset: Overrides that select the data set.
        ways: Overrides of each run that is compared with the window engine, by name.
    """

    name: str
    card: str
    dataset: tuple[str, ...]
    ways: dict[str, tuple[str, ...]]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the agreement of dense and window maps, and write ``agreement.json``."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--googlenet", type=Path, help="card of a trained GoogLeNet; without it only the demo network")
    parser.add_argument("--slide", type=Path, help="a real slide")
    parser.add_argument("--size-px", type=int, help="side of the synthetic slides, default 2048")
    parser.add_argument("--demo-stride", type=int, default=16)
    parser.add_argument("--googlenet-stride", type=int, default=56)
    parser.add_argument("--real-stride", type=int, default=112, help="of GoogLeNet on the real slide")
    given = parser.parse_args(argv)
    about, values, rows = machine(), {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["WSIFLOW_CACHE"] = str(folder / "cache")
        size_px = given.size_px or 2048
        say(f"drawing six slides of {size_px} px")
        manifest = write_dataset(folder / "slides", size_px=size_px, seed=1)
        for case in _cases(given, manifest):
            values[case.name] = _compared(folder, case)
            rows += _rows(case.name, values[case.name])
    columns = ["network and slides", "engine", "scores", "mean", "median", "95 %", "99 %", "largest"]
    columns += ["Pearson's r", "flips at 0.5", "FROC"]
    title = "Dense maps against window maps: absolute differences of probability over whole slides, fp32"
    finish(given, "agreement", about, values, [ResultTable(title, columns, rows)])


def _cases(given: argparse.Namespace, manifest: Path) -> list[NetworkCase]:
    """Return the cases to compare."""
    synthetic = ("dataset=manifest", f"dataset.manifest={manifest}")
    if given.quick:
        synthetic += ("dataset.limit=1",)
    networks = {"demo": ("pkg:demo.json", given.demo_stride, given.googlenet_stride)}
    if given.googlenet is not None:
        networks["googlenet"] = (str(given.googlenet), given.googlenet_stride, given.real_stride)
    cases = []
    for name, (card, stride, real_stride) in networks.items():
        stride = 56 if given.quick else stride
        ways: dict[str, tuple[str, ...]] = {"dense": ()}
        if name == "googlenet":
            ways["dense, shared to pool3"] = ("dense.share_until=pool3",)
        cases.append(
            NetworkCase(f"{name}, synthetic, stride {stride}", card, (*synthetic, f"inference.stride={stride}"), ways)
        )
        if given.slide is not None:
            stride = 112 if given.quick else real_stride
            real = ("dataset=single", f"dataset.path={given.slide}", "geometry.max_upsample=2.1")
            real += (f"inference.stride={stride}",)
            cases.append(NetworkCase(f"{name}, {given.slide.name}, stride {stride}", card, real, ways))
    return cases


def _compared(folder: Path, case: NetworkCase) -> dict[str, Any]:
    """Run a case in every way, and return the comparison of each run with the window engine by name."""
    common = ["model=card", f"model.card={case.card}", *case.dataset, "executor=process", "evaluation.bootstrap=0"]
    say(f"{case.name}: window")
    with product.run(folder, *common, "inference=window", *_stride(case)) as (out, metrics):
        expected = product.heatmaps(out)
        results: dict[str, Any] = {"window": {"froc": metrics.get("froc.score")}}
    for name, overrides in case.ways.items():
        say(f"{case.name}: {name}")
        with product.run(folder, *common, "dense.tolerance=1", "dense.windows=50", *overrides) as (out, metrics):
            maps = product.heatmaps(out)
            about = {key: value for key, value in metrics.items() if key.startswith("dense.")}
        results[name] = _apart(maps, expected) | {"froc": metrics.get("froc.score"), "certificate": about}
    return results


def _stride(case: NetworkCase) -> list[str]:
    """Return the override of the stride, which has to be repeated because ``inference=window`` sets another one."""
    return [override for override in case.dataset if override.startswith("inference.stride")]


def _apart(maps: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Return the agreement of the cells of all slides: moments, flips and quantiles of the absolute difference.

    Raises:
        RuntimeError: A cell has a score in one of the maps only.
    """
    left, right = (np.concatenate([each[key].ravel() for key in sorted(expected)]) for each in (maps, expected))
    known = ~np.isnan(right)
    if not np.array_equal(known, ~np.isnan(left)):
        raise RuntimeError("the maps have scores at different places")
    left, right = left[known], right[known]
    apart = np.abs(left.astype(np.float64) - right)
    quantiles = {f"q{100 * q:.0f}": float(np.quantile(apart, q)) for q in _QUANTILES}
    measures = certificate.score_deviation(left, right)._asdict()  # of all cells, which needs no bounds
    return {name: value for name, value in measures.items() if not name.endswith("_at_most")} | quantiles


def _rows(name: str, results: dict[str, Any]) -> list[list[str]]:
    """Return the table rows of a case, one for each way."""
    rows = []
    for way, each in results.items():
        froc = "" if each["froc"] is None or np.isnan(each["froc"]) else f"{each['froc']:.3f}"
        if way == "window":
            rows.append([name, way, *[""] * 8, froc])
            continue
        numbers = [each[key] for key in ("mean_abs_diff", "q50", "q95", "q99", "max_abs_diff")]
        cells = [f"{each['n']:,}", *(f"{number:.2g}" for number in numbers)]
        rows.append([name, way, *cells, f"{each['correlation']:.5f}", f"{each['flips']:.2%}", froc])
    return rows


if __name__ == "__main__":
    main()
