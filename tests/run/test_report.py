"""The report: every number that exists, words where none does, and one self-contained file."""

import html
import io
import math
import re
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from wsiflow.evaluation import froc
from wsiflow.plan import outline
from wsiflow.run.results import cost, report

CURVE = {"fp_per_slide": [3.0, 1.0, 0.0, 0.0], "sensitivity": [0.8, 0.6, 0.4, 0.0]}
NO_CURVE: dict[str, list[float]] = {"fp_per_slide": [], "sensitivity": []}
PICTURE = outline.tissue_png(np.ones((30, 20), dtype=bool))
_FOLDER = tempfile.TemporaryDirectory()
_OVERLAY = Path(_FOLDER.name) / "s1.png"
_OVERLAY.write_bytes(PICTURE)


def metrics(**given: float) -> dict[str, float]:
    """Return the metrics of a run with changes; ``__`` stands for the point in a name."""
    numbers = {
        "froc.score": 0.612,
        "froc.score_ci_low": 0.41,
        "froc.score_ci_high": 0.78,
        "froc.strict_score": 0.6,
        "froc.strict_score_ci_low": 0.4,
        "froc.strict_score_ci_high": 0.7,
        "froc.n_slides": 4.0,
        "froc.n_lesions": 7.0,
        "roc.auc": 0.93,
        "roc.auc_ci_low": 0.8,
        "roc.auc_ci_high": 1.0,
        "roc.n_tumour": 3.0,
        "roc.n_normal": 1.0,
        "throughput.core_hours": 0.0523,
        "throughput.wall_s": 120.4,
        "throughput.tiles_per_s": 5.25,
        "throughput.core_seconds_per_tile": 0.31,
        "throughput.efficiency": 0.87,
    }
    numbers |= {f"cost.{step}_core_s": 0.0 for step in cost.STEPS} | {"cost.infer_core_s": 75.0}
    numbers |= {"cost.read_core_s": 25.0}
    for prefix in ("froc.", "froc.strict_"):
        numbers |= {f"{prefix}sensitivity_at_{rate:g}": 0.5 for rate in froc.RATES}
    return numbers | {name.replace("__", "."): value for name, value in given.items()}


def row(**given: Any) -> dict[str, Any]:
    """Return the row of a scored slide, as read from a CSV, with changes."""
    usual = {"slide_id": "s1", "status": "done", "reason": "", "n_tiles": "120", "seconds_wall": "31.612"}
    scored = {"label": "1", "score": "0.98765", "n_detections": "3", "n_lesions": "5", "n_found": "2"}
    return {**usual, **scored, "n_false_positives": "1", "note": "", **given}


def data(**given: Any) -> report.ReportData:
    """Return the content of the report of a small run, with changes."""
    content: dict[str, Any] = {
        "name": "run",
        "metrics": metrics(),
        "slides": [row()],
        "overlays": {"s1": _OVERLAY},
        "maps": {},
        "figures": {"froc.png": PICTURE, "roc.png": PICTURE},
        "settings": {"geometry.convention": "centred", "inference.engine": "window", "inference.stride": 16},
        "versions": {"wsiflow": "0.1.0", "numpy": "2.4"},
        "plan_hash": "0123456789abcdef",
        "inference": "dense, openvino bf16: precision bf16 was chosen, on 2 blocks of slide a",
    }
    return report.ReportData(**{**content, **given})


class Checker(HTMLParser):
    """Collect the references of a page and its unclosed elements."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element and its references."""
        self.seen.add(tag)
        self.references += [value or "" for name, value in attrs if name in {"src", "href"}]
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Check that elements close in order."""
        assert self.open.pop() == tag


def words(page: str) -> str:
    """Return the text of a page without tags."""
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL))


def drawn(png: bytes) -> NDArray[np.uint8]:
    """Return the pixels of a figure."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def coloured(png: bytes) -> int:
    """Return the number of pixels of a figure that are not grey."""
    pixels = drawn(png).astype(int)
    return int((pixels.max(axis=2) - pixels.min(axis=2) > 60).sum())


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    """Every element closes, every reference is inline, and there is no script."""
    checker = Checker()
    checker.feed(report.render(data()))
    assert checker.open == []
    assert len(checker.references) == 3
    assert all(reference.startswith("data:image/") for reference in checker.references)
    assert "script" not in checker.seen


def test_maps_of_further_classes_are_linked() -> None:
    """A slide with a result has a link to each, with the class as its text; one without has none."""
    maps = {"in <situ>": "maps/{slide}.in_situ.tif"}
    page = report.render(data(slides=[row(slide_id="s 1"), row(slide_id="s2", reason="unreadable")], maps=maps))
    assert page.count("maps/") == 1
    assert 'maps: <a href="maps/s%201.in_situ.tif">in &lt;situ&gt;</a>' in page


def test_the_headline_numbers_are_there() -> None:
    """Scores with intervals, slides, cost and speed are shown as a reader would quote them."""
    text = words(report.render(data()))
    for part in (
        "0.612 95 % interval 0.410 to 0.780",
        "0.930 95 % interval 0.800 to 1.000",
        "1 of 1 none missing",
        "0.0523 wall time 120 s",
        "5.25 0.31 core-seconds per tile",
        "infer 75.0 % 75.0 core-s",
        "Scores: dense, openvino bf16: precision bf16 was chosen, on 2 blocks of slide a.",
    ):
        assert part in text


def test_a_slide_has_its_row() -> None:
    """A row has truth, score, lesions, seconds and the picture."""
    page = report.render(data())
    assert "s1 done tumour 0.988 3 2 of 5 1 120 31.6" in words(page)
    assert 'alt="scores on s1" src="data:image/jpeg' in page


def test_without_truth_no_curve_and_no_score_is_shown() -> None:
    """Undefined scores are stated in words in place of figures."""
    blank = {name: math.nan for name in metrics() if name.startswith(("froc.s", "roc.auc"))}
    bare = row(label="", n_lesions="", n_found="", n_false_positives="")
    page = report.render(data(metrics=metrics() | blank | {"froc.n_lesions": 0.0}, slides=[bare]))
    assert 'alt="FROC curve"' not in page
    assert 'alt="Slide ROC curve"' not in page
    assert "FROC is not defined: it needs truth for tumour and for normal slides." in words(page)
    assert "nan" not in words(page)
    assert "FROC score 0" not in words(page)
    assert "s1 done — 0.988 3 — — 120 31.6" in words(page)


def test_missing_slides_make_the_page_partial() -> None:
    """Each missing slide is named with its reason, and the numbers are marked."""
    lost = {"slide_id": "s2", "status": "rejected", "reason": "not a slide", "n_tiles": "0", "seconds_wall": ""}
    text = words(report.render(data(slides=[row(), lost])))
    assert "PARTIAL Scored without 1 of 2 slides." in text
    assert "s2 not a slide" in text
    assert "1 of 2 1 missing" in text
    assert "PARTIAL" not in words(report.render(data()))


def test_nothing_executed_is_said() -> None:
    """A run without timed work shows neither a bar nor a speed."""
    idle = {name: math.nan for name in metrics() if name.startswith("throughput.")}
    idle |= {f"cost.{step}_core_s": 0.0 for step in cost.STEPS}
    text = words(report.render(data(metrics=metrics() | idle)))
    assert "No step was timed" in text
    assert "nan" not in text


@pytest.mark.parametrize("field", ["name", "slide", "reason", "setting", "version"])
def test_text_from_outside_is_escaped(field: str) -> None:
    """No name, reason or setting can add markup to the page."""
    evil = "<script>x</script>&"
    changes: dict[str, dict[str, Any]] = {
        "name": {"name": evil},
        "slide": {"slides": [row(slide_id=evil)]},
        "reason": {"slides": [row(reason=evil)]},
        "setting": {"settings": {**data().settings, evil: evil}},
        "version": {"versions": {"wsiflow": evil}},
    }
    page = report.render(data(**changes[field]))
    assert "<script>" not in page
    assert "&lt;script&gt;x&lt;/script&gt;&amp;" in page


def test_secrets_are_not_shown() -> None:
    """A password in the settings is not on the page."""
    page = report.render(data(settings={**data().settings, "tracking.password": "canary"}))
    assert "canary" not in page


def test_the_same_run_gives_the_same_page() -> None:
    """The page contains no clock and no random number."""
    assert report.render(data()) == report.render(data())


def test_the_citation_names_mode_interval_and_plan() -> None:
    """The sentence to quote names mode, interval and plan."""
    cited = "FROC score 0.612 [95 % interval 0.410 to 0.780] (official CAMELYON16 scoring, 4 slides, 7 lesions)"
    text = words(report.render(data()))
    assert cited in text
    assert "(3 tumour slides, 1 normal slide)" in text
    assert "wsiflow 0.1.0, plan 0123456789ab." in text


def test_froc_figure_draws_both_modes() -> None:
    """Both curves are drawn, and the same curves give the same bytes."""
    one = report.froc_figure({"official": CURVE, "strict": NO_CURVE})
    both = report.froc_figure({"official": CURVE, "strict": {**CURVE, "sensitivity": [0.3, 0.2, 0.1, 0.0]}})
    assert coloured(both) > coloured(one) > 0
    assert one == report.froc_figure({"official": CURVE, "strict": NO_CURVE})


def test_figures_without_truth_draw_no_curve() -> None:
    """Empty and null curves are replaced by words."""
    unknown = {"fp_per_slide": [1.0, 0.0], "sensitivity": [None, None]}
    for curve in (NO_CURVE, unknown):
        assert coloured(report.froc_figure({"official": curve, "strict": curve})) == 0
    assert coloured(report.roc_figure({"fpr": [], "tpr": []})) == 0


def test_roc_figure_draws_its_curve() -> None:
    """A perfect curve lies along the left and the top edge."""
    perfect = drawn(report.roc_figure({"fpr": [0.0, 0.0, 1.0], "tpr": [0.0, 1.0, 1.0]})).astype(int)
    chance = drawn(report.roc_figure({"fpr": [0.0, 1.0], "tpr": [0.0, 1.0]})).astype(int)
    rows = [np.nonzero(picture[..., 2] - picture[..., 0] > 60)[0].mean() for picture in (perfect, chance)]
    assert rows[0] < rows[1]


def test_a_page_of_many_slides_holds_some_of_their_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other pictures stay files and are not read; all of them would be too large for a browser."""
    monkeypatch.setattr(report, "_MOST_PICTURES", 2)
    names = [f"s{number}" for number in range(5)]
    overlays = {name: _OVERLAY if number < 2 else Path("/never read") for number, name in enumerate(names)}
    page = report.render(data(slides=[row(slide_id=name) for name in names], overlays=overlays))
    assert page.count('alt="scores on') == 2
    assert "The pictures of 3 more slides are in heatmaps/<slide>.png only" in html.unescape(words(page))
