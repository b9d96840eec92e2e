"""Measure what a cascade costs on slides with small lesions, and where its core-seconds go.

The slides are synthetic: tissue of several square millimetres, and on some one micrometastasis. They are tested whole,
and with a first pass of the classifier `pcam` at 0.97 um per pixel, whose threshold is chosen on other slides of the
same kind. The run's own network is a GoogLeNet: that of ``--googlenet``, a card of `training/train_googlenet.py`, else
one whose last layer alone is fitted, in a minute (`networks.fitted_card`). What a cascade loses is measured by
`benchmarks.cascade_loss`. Nothing here is a clinical result.
"""

import argparse
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks import networks, product
from benchmarks.measuring import ResultTable, arguments, finish, machine, say
from wsiflow.evaluation import discordance, paired
from wsiflow.evaluation.matches import EvaluationRecord, read_matches
from wsiflow.run import first_pass
from wsiflow.run.results.record import all_receipts
from wsiflow.slides import pyramid
from wsiflow.slides.synthetic import dataset
from wsiflow.slides.synthetic.tissue import UM_PX, Lesion, SlideSpec, polygon, render
from wsiflow.system.machine import cpu_supports_bf16

_BAND_PX = 512
_LESION_UM = (250.0, 450.0)
_PLACES = 20
_DRAWS = 500
NONE, PCAM = "none", "pcam"
FIRST, OWN, CERTIFICATES, _REST = "first pass", "own pass", "certificates", "tissue, maps, detections"
_PARTS = (FIRST, OWN, CERTIFICATES, _REST)
_KINDS = {"prediction": OWN, "certificate": CERTIFICATES}


class Slides(NamedTuple):
    """Slides to write: side, px, and the numbers of those with a lesion, without, and to choose the threshold on."""

    size_px: int
    tumour: int
    normal: int
    development: int


class _Drawn(NamedTuple):
    """A slide to write: its path, and what is on it."""

    path: Path
    spec: SlideSpec


class Trial(NamedTuple):
    """What a run costs and finds: its metrics, where the core-seconds of its line go, and its evaluation."""

    metrics: Mapping[str, float]
    parts_s: Mapping[str, float]
    record: EvaluationRecord


class Written(NamedTuple):
    """The manifests of slides: those under test, and those on which the threshold is chosen."""

    tested: Path
    development: Path

    def first_pass(self) -> list[str]:
        """Return the settings of a first pass of `pcam`."""
        of_threshold = ["inference.cascade.threshold=auto", "inference.cascade.sensitivity=1"]
        return [
            "inference.cascade.model=pkg:pcam.json",
            f"inference.cascade.development={self.development}",
            *of_threshold,
        ]


_FULL, _QUICK = Slides(8192, 1, 1, 2), Slides(3072, 1, 1, 1)


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the cascade with a whole run, and write ``cascade.json``."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--googlenet", type=Path, help="card of the run's own network")
    parser.add_argument("--strides", type=int, nargs="+", default=[16, 56], help="of the run's own pass")
    able = ["bf16"] if cpu_supports_bf16() else ["fp32"]
    parser.add_argument("--precisions", nargs="+", default=able, help="of both passes")
    parser.add_argument("--size-px", type=int, help=f"side of the slides, default {_FULL.size_px}")
    with_slides(parser)
    given = parser.parse_args(argv)
    about = machine()
    with tempfile.TemporaryDirectory() as name:
        values = _costs(Path(name), given)
    finish(given, "cascade", about, values, [_table(values)])


def with_slides(parser: argparse.ArgumentParser) -> None:
    """Add the options of how slides are written."""
    parser.add_argument("--slides", type=Path, help="folder in which slides are kept for another time")
    parser.add_argument("--workers", type=int, default=2, help="processes that write slides and run them")


def _costs(folder: Path, given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run few large slides at each precision and stride, whole and as a cascade, and return numbers by way."""
    slides = _QUICK if given.quick else _FULL
    card = given.googlenet or ("pkg:demo.json" if given.quick else networks.fitted_card("googlenet", folder))
    written = write_slides(folder, slides._replace(size_px=given.size_px or slides.size_px), given)
    settings = list(itertools.product(given.precisions, given.strides))
    with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
        compared = pool.map(partial(_compared, folder, written, card), *zip(*settings, strict=True))
        return dict(itertools.chain.from_iterable(each.items() for each in compared))


def _compared(folder: Path, written: Written, card: Path | str, precision: str, stride: int) -> dict[str, Any]:
    """Run slides whole and as a cascade, and return numbers by way."""
    common = ["model=card", f"model.card={card}", f"inference.precision={precision}", f"inference.stride={stride}"]
    ways = {NONE: [], PCAM: written.first_pass()}
    trials = {name: _trial(folder, written, [*common, *more]) for name, more in ways.items()}
    return {f"{precision}, stride {stride}: {name}": _numbers(trials, name) for name in trials}


def _trial(folder: Path, written: Written, overrides: Sequence[str]) -> Trial:
    """Run the slides under test with these settings besides, and return what that costs and finds."""
    say(" ".join(overrides))
    common = ["dataset=manifest", f"dataset.manifest={written.tested}", "executor=inline", "dense.on_excess=report"]
    with product.run(folder, *common, "store=none", *overrides) as (out, metrics):
        parts_s = _parts_s(all_receipts(out))
        say(", ".join(f"{part} {seconds:.1f} core-s" for part, seconds in parts_s.items()))
        return Trial(metrics, parts_s, read_matches(out / "evaluation/matches.json"))


def _numbers(trials: Mapping[str, Trial], name: str) -> dict[str, Any]:
    """Return what a way costs and finds, also in comparison with the whole run."""
    one, whole = trials[name], trials[NONE]
    found: dict[str, Any] = {"metrics": dict(one.metrics), "parts_s": dict(one.parts_s)}
    if name == NONE:
        return found
    return found | {"shares": _shares(one.parts_s, whole.parts_s), **paired_loss(whole.record, one.record)}


def paired_loss(whole: EvaluationRecord, other: EvaluationRecord) -> dict[str, Any]:
    """Return the strict FROC score of a whole run and of a cascade, the paired loss, and its upper 95 % bound."""
    settings = [whole.setting(NONE), other.setting(PCAM)]
    compared = paired.bootstrap(settings, reference=NONE, n=_DRAWS, seed=0)
    difference = compared.differences[PCAM]["froc.strict_score"]
    low, units = difference.low, compared.evidence[PCAM]["froc.strict_score"].units
    if np.isnan(low) and units is not None:
        low, _ = discordance.score_interval(units)
    scores = [compared.intervals[name]["froc.strict_score"].value for name in (NONE, PCAM)]
    return {"scores": scores, "froc_loss": 0.0 - difference.value, "froc_loss_at_most": 0.0 - low}


def _parts_s(receipts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return where the core-seconds of the line of a run go."""
    parts = dict.fromkeys(_PARTS, 0.0)
    for receipt in receipts:
        is_first = receipt["path"].startswith(f"{first_pass.FOLDER}/")
        parts[FIRST if is_first else _KINDS.get(receipt["kind"], _REST)] += receipt["cpu_s"]
    return parts


def _shares(parts: Mapping[str, float], whole: Mapping[str, float]) -> dict[str, float]:
    """Return the cost of a way over that of the whole run: of the line, without certificates, and without both."""
    line, line_whole = sum(parts.values()), sum(whole.values())
    own, own_whole = line - parts[CERTIFICATES], line_whole - whole[CERTIFICATES]
    return {"line": line / line_whole, "without certificates": own / own_whole}


def _table(values: Mapping[str, Mapping[str, Any]]) -> ResultTable:
    """Return the table of costs, in core-seconds by part."""
    rows = []
    for name, numbers in values.items():
        metrics, parts = numbers["metrics"], numbers["parts_s"]
        cells = [name, *(f"{parts[part]:.1f}" for part in _PARTS), f"{sum(parts.values()):.0f}"]
        if "shares" in numbers:
            cells += [f"{share:.2f}" for share in numbers["shares"].values()]
            cells += [f"{metrics['cascade.passed_over']:.1%}", f"{metrics['cascade.missed']:.1%}"]
        else:
            cells += [""] * 4
        rows.append([*cells, f"{metrics['froc.strict_score']:.2f}", _refused(metrics)])
    columns = ["precision, stride: first pass", *(f"{part}, core-s" for part in _PARTS), "line, core-s"]
    columns += ["of the whole run", "without certificates", "passed over", "missed cells", "strict FROC"]
    return ResultTable("Cost of cascades against whole runs", [*columns, "slides refused"], rows)


def _refused(metrics: Mapping[str, float]) -> str:
    """Return how many slides the certificates refuse."""
    return f"{metrics['certificate.slides_beyond']:.0f} of {metrics['froc.n_slides']:.0f}"


def write_slides(folder: Path, slides: Slides, given: argparse.Namespace) -> Written:
    """Write the slides that are missing, and return their manifests."""
    kept = (given.slides.resolve() if given.slides else folder) / "-".join(map(str, slides))
    tested = _manifest(kept / "tested", slides, seed=1, workers=given.workers)
    others = slides._replace(tumour=slides.development, normal=0)
    return Written(tested, _manifest(kept / "development", others, seed=2, workers=given.workers))


def _manifest(folder: Path, slides: Slides, *, seed: int, workers: int) -> Path:
    """Write slides with and without a micrometastasis, unless that was done, and return their manifest."""
    manifest = folder / "manifest.csv"
    if manifest.exists():
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    tumour, count = slides.tumour, slides.tumour + slides.normal
    drawn = [
        _Drawn(folder / f"{'tumor' if index < tumour else 'normal'}_{index:03}.tif", _spec(slides, 1000 * seed + index))
        for index in range(count)
    ]
    drawn[:tumour] = [one._replace(spec=_with_lesion(one.spec)) for one in drawn[:tumour]]
    say(f"{count} slides of {slides.size_px} px")
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(_write, drawn))
    lines = ["slide_id,path,mpp,label,annotation_path"]
    for path, spec in drawn:
        truth = ""
        if spec.lesions:
            truth = f"{path.stem}.xml"
            (folder / truth).write_text(dataset.asap_xml(spec.lesions), encoding="utf-8")
        lines.append(f"{path.stem},{path.name},{UM_PX},{'tumor' if spec.lesions else 'normal'},{truth}")
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return manifest


def _spec(slides: Slides, seed: int) -> SlideSpec:
    return dataset.plan_slide("none", width_px=slides.size_px, height_px=slides.size_px, seed=seed)


def _with_lesion(spec: SlideSpec) -> SlideSpec:
    """Return a slide with one micrometastasis, at the place deepest inside the tissue of some that are drawn."""
    rng = np.random.default_rng(spec.seed)
    radius = rng.uniform(*_LESION_UM) / 2 / UM_PX
    tissue = [np.array(piece, np.float32) for piece in spec.tissue]
    centres = rng.uniform(0, (spec.width_px, spec.height_px), (_PLACES, 2))
    inside = [max(cv2.pointPolygonTest(piece, one, measureDist=True) for piece in tissue) for one in centres.tolist()]
    return replace(spec, lesions=(Lesion(polygon(_oval(rng, radius) + centres[np.argmax(inside)])),))


def _oval(rng: np.random.Generator, radius: float) -> NDArray[np.float64]:
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    return radius * np.stack([np.cos(angle), rng.uniform(0.6, 1.0) * np.sin(angle)], axis=1)


def _write(one: _Drawn) -> None:
    spec = one.spec
    bands = (
        render(spec, 0, y, spec.width_px, min(_BAND_PX, spec.height_px - y)) for y in range(0, spec.height_px, _BAND_PX)
    )
    pyramid.write_rgb(one.path, bands, shape=(spec.height_px, spec.width_px), um_px=UM_PX, quality=85)


if __name__ == "__main__":
    main()
