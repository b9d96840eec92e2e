"""Measure the peak memory of workers by block size and precision, and of a run over a slide of 100,000 px a side.

Every size runs in fresh processes, as many at a time as there are cores. The large slide is mostly glass: one JPEG tile
that is repeated, with a square of tissue in it. Its run has default settings except for the network.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from benchmarks import networks, product
from benchmarks.measuring import ResultTable, arguments, finish, machine, say
from benchmarks.scaling import block_pixels, context_px
from flows.compose import compose_config
from wsiflow.model import scorer, scoring
from wsiflow.model.classifier import load
from wsiflow.run.stages import fastest
from wsiflow.slides.synthetic.tissue import UM_PX
from wsiflow.system.machine import cpu_supports_bf16

LIMIT_BYTES = 2_000_000_000
_FILE_TILE_PX = 256
_TISSUE_PX = 8192
_GLASS = (242, 240, 243)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the peak memory of workers, and write ``memory.json``."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--side-px", type=int, help="side of the large slide")
    given = parser.parse_args(argv)
    about = machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["WSIFLOW_CACHE"] = str(folder / "cache")
        card = "pkg:demo.json" if given.quick else str(networks.random_card("googlenet", folder))
        values: dict[str, Any] = {}
        values["blocks"], blocks_table = _blocks(card, workers=about["cores"], quick=given.quick)
        values["large"], large_table = _large(folder, card, given)
    finish(given, "memory", about, values, [blocks_table, large_table])


def _blocks(card: str, *, workers: int, quick: bool) -> tuple[dict[str, Any], ResultTable]:
    """Measure the peak memory of workers that run one block each at the same time."""
    rows, sizes = 7, (1, 4, 16)
    if quick:
        rows, sizes = 1, (1, 2)
    values: dict[str, Any] = {}
    for precision in ("fp32", "bf16") if cpu_supports_bf16() else ("fp32",):
        default = _default_cols(card, precision)
        for cols in sorted({*sizes, *([] if quick else [default])}):
            say(f"{workers} workers, {precision}, {rows} x {cols} tiles")
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                futures = [pool.submit(_peak_bytes, card, precision, rows, cols) for _ in range(workers)]
                peaks = [future.result() for future in futures]
            values[f"{precision} {rows}x{cols}"] = {"bytes": peaks, "default": cols == default}
    table_rows = [
        [
            name.split()[0],
            name.split()[1] + (" (default)" if each["default"] else ""),
            f"{max(each['bytes']) / 1e6:,.0f}",
            f"{sum(each['bytes']) / 1e6:,.0f}",
        ]
        for name, each in values.items()
    ]
    columns = ["precision", "block, tiles", "largest worker, MB", "all workers, MB"]
    return values, ResultTable(f"Peak memory of {workers} workers that run together", columns, table_rows)


def _default_cols(card: str, precision: str) -> int:
    """Return the largest number of columns of a block at default settings."""
    config = compose_config(["model=card", f"model.card={card}", f"inference.precision={precision}"])
    record = fastest.choose_engine(load(networks.spec(card)), config, threads=1)
    return int(record["choice"]["block_cols"])


def _peak_bytes(card: str, precision: str, rows: int, cols: int) -> int:
    """Run a block in this fresh process and return its peak memory in bytes."""
    classifier = load(networks.spec(card))
    context = context_px(classifier)
    how = networks.choice("dense", "openvino", precision, context_px=context)
    made = scorer.make_scorer(classifier, how, threads=1)
    assert isinstance(made, scoring.DenseScorer)
    pixels = block_pixels(rows, cols, context)
    networks.run_region(made, pixels)
    return peak_bytes()


def peak_bytes() -> int:
    """Return the peak memory of this process in bytes, without the memory inherited from its parent."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def _large(folder: Path, card: str, given: argparse.Namespace) -> tuple[dict[str, Any], ResultTable]:
    """Write and run a slide of the largest usual size, and return its values and table."""
    side_px = given.side_px or (20_000 if given.quick else 100_000)
    tissue_px = 1024 if given.quick else _TISSUE_PX
    path, begin = folder / "large.tif", time.perf_counter()
    write_large(path, side_px, tissue_px=tissue_px)
    written_s = time.perf_counter() - begin
    say(f"written: {side_px} px, {path.stat().st_size / 1e6:.0f} MB, {written_s:.0f} s")
    manifest = product.write_manifest(folder, [path])
    begin = time.perf_counter()
    product.run_command(
        folder / "run",
        *("model=card", f"model.card={card}", "dataset=manifest", f"dataset.manifest={manifest}", "dense.tolerance=1"),
    )
    cost = product.cost(folder / "run")
    values = {
        "side_px": side_px,
        "file_bytes": path.stat().st_size,
        "written_s": written_s,
        "tiles": cost.tiles,
        "run_s": time.perf_counter() - begin,
        "worker_bytes": cost.worker_bytes,
        "stored_bytes": cost.stored_bytes,
    }
    row = [
        f"{side_px:,} px",
        f"{values['file_bytes'] / 1e6:.0f}",
        str(cost.tiles),
        f"{values['run_s']:.0f}",
        ", ".join(f"{peak / 1e6:,.0f}" for peak in cost.worker_bytes),
        "yes" if max(cost.worker_bytes) < LIMIT_BYTES else "no",
    ]
    columns = ["slide", "file, MB", "tissue tiles", "run, s", "peak of each worker, MB", "under 2 GB"]
    return values, ResultTable("A large slide at default settings, fp32, all workers", columns, [row])


def write_large(path: Path, side_px: int, *, tissue_px: int) -> None:
    """Write a pyramid of glass with a square of tissue; a tile of each kind is encoded once and repeated.

    Args:
        path: The file to write.
        side_px: Side of the slide.
        tissue_px: Side of the tissue, a power of two of at least 256; its corner is near the middle of the slide, at a
            multiple of ``tissue_px``.
    """
    drawn = networks.tissue(_FILE_TILE_PX)
    first_px = side_px // 2 // tissue_px * tissue_px
    levels = 0
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        while side_px >> levels >= _FILE_TILE_PX:
            side = side_px >> levels
            tiff.write(
                _tiles(drawn, side, first_px / 2**levels, tissue_px / 2**levels),
                shape=(side, side, 3),
                dtype=np.uint8,
                tile=(_FILE_TILE_PX, _FILE_TILE_PX),
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                subfiletype=int(levels > 0),
                resolution=(10_000 / UM_PX, 10_000 / UM_PX),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
            levels += 1


def _tiles(drawn: NDArray[np.uint8], side: int, first: float, extent: float) -> Iterator[bytes]:
    """Yield the encoded tiles of one level; only tiles that are partly tissue are encoded anew."""
    glass, whole = (_encoded(pixels) for pixels in (np.full_like(drawn, _GLASS), drawn))
    count = -(-side // _FILE_TILE_PX)
    spans = []
    for tile in range(count):
        begin, end = (
            round(min(max(edge - tile * _FILE_TILE_PX, 0), _FILE_TILE_PX)) for edge in (first, first + extent)
        )
        spans.append((begin, end))
    for top, bottom in spans:
        for left, right in spans:
            area = (bottom - top) * (right - left)
            if area in {0, _FILE_TILE_PX**2}:
                yield whole if area else glass
                continue
            pixels = np.full_like(drawn, _GLASS)
            pixels[top:bottom, left:right] = drawn[top:bottom, left:right]
            yield _encoded(pixels)


def _encoded(pixels: NDArray[np.uint8]) -> bytes:
    return bytes(
        imagecodecs.jpeg8_encode(
            pixels, level=80, colorspace="RGB", outcolorspace="YCBCR", subsampling="420", optimize=True
        )
    )


if __name__ == "__main__":
    main()
