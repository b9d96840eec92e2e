"""Measure what a cascade saves on slides with small lesions, what it loses, and that a blind first pass is caught.

The slides are synthetic, at real scale: some have a micrometastasis, in several square millimetres of tissue. They are
tested whole, then with a first pass of the classifier `pcam` at 0.97 um per pixel, whose threshold is chosen on other
slides of the same kind, and with a first pass of random weights. FROC is compared on the same slides. The network is
the demo network, so nothing here is a clinical result.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
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
from wsiflow.slides import pyramid
from wsiflow.slides.synthetic import dataset
from wsiflow.slides.synthetic.tissue import UM_PX, Lesion, SlideSpec, polygon, render

_BAND_PX = 512
_LESION_UM = (250.0, 450.0)
_PLACES = 20
_DRAWS = 500
_BLIND = "random weights"


class _Drawn(NamedTuple):
    """A slide to write: its path, and what is on it."""

    path: Path
    spec: SlideSpec


class _Trial(NamedTuple):
    """What a run costs and finds: its metrics, and its evaluation."""

    metrics: Mapping[str, float]
    record: EvaluationRecord


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the cascade with a whole run, and write ``cascade.json``."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--size-px", type=int, help="side of the slides, default 10240")
    parser.add_argument("--tumour", type=int, help="number of slides with a lesion, default 5")
    parser.add_argument("--normal", type=int, help="number of slides without, default 4")
    parser.add_argument("--stride", type=int, default=56)
    parser.add_argument("--workers", type=int, default=2, help="processes that write the slides")
    given = parser.parse_args(argv)
    about = machine()
    with tempfile.TemporaryDirectory() as name:
        trials = _trials(Path(name), given)
    values = {name: {**_numbers(trials, name), "metrics": dict(one.metrics)} for name, one in trials.items()}
    columns = ["first pass", "core-s of the line", "of the whole run", "without certificates", "first pass, core-s"]
    columns += [
        "passed over",
        "missed cells",
        "strict FROC",
        "loss, paired",
        "a loss above is excluded (95 %)",
        "slides refused",
    ]
    title = "Cascades against the whole run on synthetic slides with micrometastases"
    finish(given, "cascade", about, values, [ResultTable(title, columns, [_row(*one) for one in values.items()])])


def _trials(folder: Path, given: argparse.Namespace) -> dict[str, _Trial]:
    """Write the slides, run all ways, and return what each costs and finds."""
    size = given.size_px or (4096 if given.quick else 10_240)
    tumour = given.tumour or (1 if given.quick else 5)
    normal = given.normal or (1 if given.quick else 4)
    tested = _written(folder / "tested", size, tumour, normal, seed=1, workers=given.workers)
    other = _written(folder / "development", size, max(1, tumour // 2), 0, seed=2, workers=given.workers)
    common = ["dataset=manifest", f"dataset.manifest={tested}", f"inference.stride={given.stride}", "executor=inline"]
    common += ["dense.on_excess=report", "model=demo", "store=none"]
    first = ["inference.cascade.model=pkg:pcam.json", "inference.cascade.threshold=auto"]
    first += [f"inference.cascade.development={other}", "inference.cascade.sensitivity=1"]
    blind = [f"inference.cascade.model={networks.random_card('inception_valid', folder)}"]
    ways = {"none": [], "pcam": first, _BLIND: [*blind, "inference.cascade.um_px=1", "inference.cascade.threshold=1"]}
    trials = {}
    for name, overrides in ways.items():
        say(f"first pass: {name}")
        with product.run(folder, *common, *overrides) as (out, metrics):
            trials[name] = _Trial(metrics, read_matches(out / "evaluation/matches.json"))
    return trials


def _numbers(trials: Mapping[str, _Trial], name: str) -> dict[str, float]:
    """Return the cost of a way over that of the whole run, and its paired loss of the strict FROC score with bounds."""
    one, whole = trials[name], trials["none"]
    line, alone = ((_core_s(one.metrics, but) / _core_s(whole.metrics, but)) for but in ("", "certify"))
    shares = {"cost_share": line, "cost_share_without_certificates": alone}
    if name == "none":
        return shares
    settings = [whole.record.setting("whole"), one.record.setting("cascade")]
    found = paired.bootstrap(settings, reference="whole", n=_DRAWS, seed=0)
    difference = found.differences["cascade"]["froc.strict_score"]
    low = difference.low
    units = found.evidence["cascade"]["froc.strict_score"].units
    if np.isnan(low) and units is not None:
        low, _ = discordance.score_interval(units)
    return shares | {"froc_loss": 0.0 - difference.value, "froc_loss_at_most": 0.0 - low}


def _core_s(metrics: Mapping[str, float], but: str) -> float:
    """Return the core-seconds of the line of a run, without those of a step; empty for all."""
    return 3600 * metrics["throughput.core_hours"] - (metrics[f"cost.{but}_core_s"] if but else 0.0)


def _row(name: str, numbers: Mapping[str, Any]) -> list[str]:
    """Return a way as a row of the table."""
    metrics = numbers["metrics"]
    cells = [name, f"{_core_s(metrics, ''):.0f}", f"{numbers['cost_share']:.2f}"]
    cells.append(f"{numbers['cost_share_without_certificates']:.2f}")
    froc = f"{metrics['froc.strict_score']:.3f}"
    if name == "none":
        return [*cells, "", "", "", froc, "", "", ""]
    return [
        *cells,
        f"{metrics['cost.first_pass_core_s']:.0f}",
        f"{metrics['cascade.passed_over']:.1%}",
        f"{metrics['cascade.missed']:.1%}",
        froc,
        f"{numbers['froc_loss']:+.3f}",
        f"{numbers['froc_loss_at_most']:.3f}",
        f"{metrics['certificate.slides_beyond']:.0f} of {metrics['froc.n_slides']:.0f}",
    ]


def _written(folder: Path, size_px: int, tumour: int, normal: int, *, seed: int, workers: int) -> Path:
    """Write slides with and without a micrometastasis, and return their manifest."""
    folder.mkdir()
    drawn = [
        _Drawn(folder / f"{'tumor' if index < tumour else 'normal'}_{index:03}.tif", _spec(size_px, 100 * seed + index))
        for index in range(tumour + normal)
    ]
    drawn[:tumour] = [one._replace(spec=_with_lesion(one.spec)) for one in drawn[:tumour]]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(_write, drawn))
    lines = ["slide_id,path,mpp,label,annotation_path"]
    for path, spec in drawn:
        truth = ""
        if spec.lesions:
            truth = f"{path.stem}.xml"
            (folder / truth).write_text(dataset.asap_xml(spec.lesions), encoding="utf-8")
        lines.append(f"{path.stem},{path.name},{UM_PX},{'tumor' if spec.lesions else 'normal'},{truth}")
    manifest = folder / "manifest.csv"
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return manifest


def _spec(size_px: int, seed: int) -> SlideSpec:
    return dataset.plan_slide("none", width_px=size_px, height_px=size_px, seed=seed)


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
