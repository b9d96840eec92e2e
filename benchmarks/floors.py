"""Measure the limits of this machine (floors), and how far the dense pass and the readers are from them.

The peak rate of a precision is the fastest rate at which a library runs products of large matrices, or a convolution.
The dense pass runs in turns with these. Reading is compared among decoding of single JPEG tiles, wsiflow's reader and
OpenSlide.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import openslide
import tifffile
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks import networks, product
from benchmarks.measuring import ResultTable, Spent, Spread, arguments, finish, interleave, machine, say, spread
from wsiflow.model.classifier import Classifier
from wsiflow.model.dense.network import describe
from wsiflow.model.engines.engine import prepare, quantise
from wsiflow.model.engines.spec import Backend, EngineSpec, Network, Precision
from wsiflow.slides import slide
from wsiflow.system.machine import cpu_supports_bf16

_LAYERS = 4


class Size(NamedTuple):
    """How much is measured: sides of the matrices, of the convolution's maps, of the dense block and slide; rounds."""

    matrix: int
    map_px: int
    region_px: int
    side_px: int
    rounds: int


def main(argv: Sequence[str] | None = None) -> None:
    """Measure peak rates of products and of reading, and write ``floors.json``."""
    given = arguments(__doc__ or "").parse_args(argv)
    size = Size(512, 32, 672, 1024, 3) if given.quick else Size(1536, 112, 1792, 4096, 7)
    about = machine()
    with tempfile.TemporaryDirectory() as name:
        os.environ["WSIFLOW_CACHE"] = str(Path(name) / "cache")
        classifier = networks.random_classifier("googlenet") if not given.quick else networks.demo()
        products, products_tables = _products(classifier, size, quick=given.quick)
        reading, reading_table = _reading(Path(name), size)
    values = {"products": products, "reading": reading}
    finish(given, "floors", about, values, [*products_tables, reading_table])


def _products(classifier: Classifier, size: Size, *, quick: bool) -> tuple[dict[str, Any], list[ResultTable]]:
    """Measure GFLOP per second of bare products and of the dense pass."""
    facts = describe(classifier, networks.STRIDE_PX)
    pixels = networks.tissue(size.region_px)
    work: dict[str, tuple[Callable[[], Any], float]] = {}
    for backend, precision in _specs(quick=quick):
        say(f"preparing {backend} {precision}")
        for kind, network, flops in _bare(size):
            work[f"{kind}, {backend} {precision}"] = _bare_run(network, EngineSpec(backend, precision)), flops
        if backend == "openvino":
            made = networks.prepared(classifier, networks.choice("dense", backend, precision), pixels)
            flops = 2 * facts.dense_macs_px * size.region_px**2
            work[f"dense pass, {backend} {precision}"] = (lambda made=made: networks.run_region(made, pixels)), flops
    for run, _ in work.values():
        run()
    rounds = interleave(
        {name: (lambda run=run, flops=flops: (run(), flops / 1e9)[1]) for name, (run, flops) in work.items()},
        rounds=size.rounds,
        unit="GFLOP",
    )
    rates = {name: spread([1 / each.core_s_tile for each in own]) for name, own in rounds.items()}
    tile_gflop = 2e-9 * facts.dense_macs_px * networks.TILE_PX**2
    values = {
        "gflop_s": rates,
        "peak_gflop_s": {precision: _peak(rates, precision) for precision in ("fp32", "bf16", "int8")},
        "tile_gflop": tile_gflop,
        "tile_window_gflop": 2e-9 * facts.window_macs * networks.WINDOWS_PER_TILE,
    }
    return values, _product_tables(values)


def _specs(*, quick: bool) -> list[tuple[Backend, Precision]]:
    """Return the backends and precisions whose peak rate is measured."""
    specs: list[tuple[Backend, Precision]] = [("torch", "fp32"), ("openvino", "fp32")]
    if cpu_supports_bf16():
        specs += [("torch", "bf16"), ("openvino", "bf16")]
    return specs if quick else [*specs, ("openvino", "int8")]


def _bare(size: Size) -> list[tuple[str, Network, float]]:
    """Return networks that consist of products only: kind, network and number of floating-point operations of each."""
    torch.manual_seed(0)
    side, map_px, channels = size.matrix, size.map_px, 256
    matrices = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(_LAYERS)))
    convolutions = nn.Sequential(*(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(_LAYERS))).to(
        memory_format=torch.channels_last
    )
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(side, side)).astype(np.float32)
    maps = rng.normal(size=(1, channels, map_px, map_px)).astype(np.float32)
    return [
        ("matrices", Network(matrices.eval, f"matrices {side}", rows, fixed=True), 2.0 * _LAYERS * side**3),
        (
            "convolution 3x3",
            Network(convolutions.eval, f"convolutions {map_px}", maps, fixed=True),
            2.0 * _LAYERS * 9 * channels**2 * map_px**2,
        ),
    ]


def _bare_run(network: Network, spec: EngineSpec) -> Callable[[], Any]:
    quantised = quantise(network, [network.example]) if spec.precision == "int8" else None
    engine = prepare(network, spec, threads=1, quantised=quantised)
    return lambda: engine(network.example)


def _peak(rates: dict[str, Spread], precision: str) -> float:
    """Return the fastest rate of bare products at a precision; 0 where none was measured."""
    own = [rate.median for name, rate in rates.items() if name.endswith(precision) and not name.startswith("dense")]
    return max(own, default=0.0)


def _product_tables(values: dict[str, Any]) -> list[ResultTable]:
    """Return tables of the rates, and of the least time per tile at the peak rate."""
    peaks = values["peak_gflop_s"]
    rows = [
        [name, rate.text(), f"{rate.median / peaks[name.split()[-1]]:.0%}"] for name, rate in values["gflop_s"].items()
    ]
    floors = [
        [precision, f"{peak:.0f}", f"{1e3 * values['tile_gflop'] / peak:.2f}"]
        for precision, peak in peaks.items()
        if peak
    ]
    shared = f"{values['tile_gflop']:.2f} GFLOP per tile dense, {values['tile_window_gflop']:.0f} window by window"
    return [
        ResultTable("Products on one core", ["what", "GFLOP/s", "of the peak at this precision"], rows),
        ResultTable(f"Floor of a tile: {shared}", ["precision", "peak, GFLOP/s", "floor, ms per tile"], floors),
    ]


def _reading(folder: Path, size: Size) -> tuple[dict[str, Any], ResultTable]:
    """Measure megapixels per second of decoders on a synthetic slide."""
    path = product.write_slide(folder / "slide.tif", size.side_px)
    block_px = min(2048, size.side_px)
    corners = [(x, y) for y in range(0, size.side_px, block_px) for x in range(0, size.side_px, block_px)]
    with tifffile.TiffFile(path) as tiff:
        tables = tiff.pages.first.jpegtables
        tiles = _segments(tiff)
    opened, plain = slide.open_slide(path, slide_id="slide"), openslide.OpenSlide(path)
    work: dict[str, Callable[[], Any]] = {
        "imagecodecs, tiles one by one": lambda: [imagecodecs.jpeg8_decode(tile, tables=tables) for tile in tiles],
        "wsiflow, blocks": lambda: [opened.read(x, y, 0, (block_px, block_px)) for x, y in corners],
        "OpenSlide, blocks": lambda: [_openslide_rgb(plain, x, y, block_px) for x, y in corners],
    }
    for run in work.values():
        run()
    decoder = opened.decoder
    rounds = interleave(
        {name: (lambda run=run: (run(), size.side_px**2 / 1e6)[1]) for name, run in work.items()},
        rounds=min(size.rounds, 5),
        unit="megapixel",
    )
    opened.close()
    plain.close()
    rates = {name: spread([1 / each.core_s_tile for each in own]) for name, own in rounds.items()}
    best = max(rate.median for rate in rates.values())
    rows = [[name, rate.text(), f"{rate.median / best:.0%}", _tile_ms(rounds[name])] for name, rate in rates.items()]
    columns = ["what", "Mpx/s", "of the fastest", "ms per 224 px tile"]
    title = f"Reading JPEG tiles of a slide of {size.side_px} px on one core (wsiflow's decoder: {decoder})"
    return {"mpx_s": rates, "decoder": decoder}, ResultTable(title, columns, rows)


def _segments(tiff: tifffile.TiffFile) -> list[bytes]:
    """Return the compressed tiles of level 0."""
    page = tiff.pages.first
    return [data for data, *_ in tiff.filehandle.read_segments(page.dataoffsets, page.databytecounts)]


def _openslide_rgb(opened: openslide.OpenSlide, x: int, y: int, side_px: int) -> NDArray[np.uint8]:
    return np.asarray(opened.read_region((x, y), 0, (side_px, side_px)).convert("RGB"))


def _tile_ms(rounds: Sequence[Spent]) -> str:
    return spread([each.core_s_tile for each in rounds]).text(1e3 * networks.TILE_PX**2 / 1e6)


if __name__ == "__main__":
    main()
