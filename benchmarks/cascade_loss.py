"""Measure what a cascade loses: its FROC score against that of whole runs, on many slides with one small lesion each.

The bound of a paired loss needs slides, because the lesions of a slide depend on each other: where none is lost, about
190 exclude a loss of 0.02 (score interval of Tango, 95 %). So the slides are small, and the run's own network is the
demo network. The first pass is `pcam`, and its threshold is the highest that keeps every lesion of other slides of the
same kind. The slides are synthetic, so that nothing here is a clinical result.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cascade import NONE, PCAM, Slides, numbers_of, refused, trial, with_slides, write_slides
from benchmarks.measuring import ResultTable, arguments, finish, machine

_FULL, _QUICK = Slides(3072, 195, 5, 32), Slides(3072, 2, 1, 1)
# What is lost is counted on every slide, so that few windows need to be certified.
_COMMON = ["model=demo", "inference.stride=32", "dense.windows=8"]


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the cascade with a whole run, and write ``cascade_loss.json``."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--lesions", type=int, help=f"number of slides with a lesion, default {_FULL.tumour}")
    parser.add_argument("--size-px", type=int, help=f"side of the slides, default {_FULL.size_px}")
    with_slides(parser)
    given = parser.parse_args(argv)
    slides, about = _QUICK if given.quick else _FULL, machine()
    slides = slides._replace(tumour=given.lesions or slides.tumour, size_px=given.size_px or slides.size_px)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = write_slides(folder, slides, given)
        ways = {NONE: [], PCAM: written.first_pass()}
        trials = {name: trial(folder, written, [*_COMMON, *more]) for name, more in ways.items()}
    values = {name: numbers_of(trials, name) for name in trials}
    finish(given, "cascade_loss", about, values, [_table(values)])


def _table(values: Mapping[str, Mapping[str, Any]]) -> ResultTable:
    rows = []
    for name, numbers in values.items():
        metrics = numbers["metrics"]
        cells = [name, f"{metrics['froc.n_slides']:.0f}", f"{numbers['lesions']}"]
        cells.append(f"{metrics['froc.strict_score']:.4f}")
        if "shares" in numbers:
            cells += [f"{numbers['froc_loss']:+.4f}", f"{numbers['froc_loss_at_most']:.4f}"]
            cells += [f"{metrics['cascade.passed_over']:.1%}", refused(metrics)]
        rows.append(cells + [""] * (8 - len(cells)))
    columns = ["first pass", "slides", "lesions", "strict FROC", "loss, paired", "a loss above is excluded (95 %)"]
    title = "Loss of a cascade on many small slides with one micrometastasis each, demo network"
    return ResultTable(title, [*columns, "passed over", "slides refused"], rows)


if __name__ == "__main__":
    main()
