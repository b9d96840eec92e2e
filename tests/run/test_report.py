"""The report: every number that exists, words where none does, and one self-contained file."""

import html
import io
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from wsiflow.evaluation import findings, froc
from wsiflow.plan import outline
from wsiflow.run.plan import latest_plan
from wsiflow.run.results import cost, report, shown
from wsiflow.slides.annotations import Outline, TruthOutlines, tumour_mask

CURVE = {"fp_per_slide": [3.0, 1.0, 0.0, 0.0], "sensitivity": [0.8, 0.6, 0.4, 0.0]}
NO_CURVE: dict[str, list[float]] = {"fp_per_slide": [], "sensitivity": []}
PICTURE = outline.tissue_png(np.ones((30, 20), dtype=bool))
IMAGE = "data:image/jpeg;base64,AAAA"


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


def described(slides: list[dict[str, Any]]) -> shown.Described:
    """Return slides as they are drawn, each of 3,000 x 2,000 px, in the order given."""
    index = [
        {"id": one["slide_id"], "name": one["slide_id"], "truth": "", "score": "", "problem": ""} for one in slides
    ]
    more = {"width": 3000, "height": 2000, "um_px": 0.25, "notes": [], "detections": [], "regions": []}
    return shown.Described(index, [one | more for one in index])


def data(**given: Any) -> report.ReportData:
    """Return the content of the report of a small run, with changes."""
    content: dict[str, Any] = {
        "name": "run",
        "metrics": metrics(),
        "slides": [row()],
        "described": described(given.get("slides", [row()])),
        "pictures": lambda _slide_id, _most_bytes: {"picture": {"src": IMAGE}},
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
        self.scripts: list[str] = []

    def handle_data(self, text: str) -> None:
        """Note the text of scripts."""
        if self.open and self.open[-1] == "script":
            self.scripts.append(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element and its references."""
        self.seen.add(tag)
        self.references += [value or "" for name, value in attrs if name in {"src", "href"}]
        if tag not in {"meta", "img", "link"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Check that elements close in order."""
        assert self.open.pop() == tag


def words(page: str) -> str:
    """Return the text of a page without tags."""
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<script.*?</script>|<[^>]+>", " ", page, flags=re.DOTALL))


def drawn_slides(page: str) -> list[dict[str, Any]]:
    """Return what the page's script draws of each slide."""
    found = re.findall(r'<script type="application/json" id="slide-0-(\d+)">(.*?)</script>', page)
    assert [int(number) for number, _ in found] == list(range(len(found)))
    return [json.loads(text) for _, text in found]


def drawn(png: bytes) -> NDArray[np.uint8]:
    """Return the pixels of a figure."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def coloured(png: bytes) -> int:
    """Return the number of pixels of a figure that are not grey."""
    pixels = drawn(png).astype(int)
    return int((pixels.max(axis=2) - pixels.min(axis=2) > 60).sum())


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    """Every element closes, every reference lies within the page, and no address is loaded."""
    checker = Checker()
    page = report.render(data())
    checker.feed(page)
    assert checker.open == []
    assert [each[:11] for each in checker.references] == ["data:,", "data:image/", "data:image/", "#slide=s1"]
    assert "default-src 'none'" in page
    assert len(checker.scripts) == 3, "the list of slides, one slide, and the viewer"


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
    """A row has truth, score, lesions and seconds, and leads to the slide's picture."""
    page = report.render(data())
    assert "s1 done tumour 0.988 3 2 of 5 1 120 31.6" in words(page)
    assert '<a href="#slide=s1">' in page
    assert [one["picture"] for one in drawn_slides(page)] == [{"src": IMAGE}]


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
    assert "<script>x" not in page
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


def test_the_total_stands_beside_the_line() -> None:
    """What everything cost is told beside what the line did; a former version's run tells the line alone."""
    text = words(report.render(data(metrics=metrics(cost__total_core_s=360.0, cost__warmup_core_s=20.0))))
    assert "Core-hours 0.1 0.0523 of them the line; wall time 120 s" in text
    assert "Everything cost 360.0 core-s up to this page: the line 188.3, and 171.7 beside it, 20.0 of them" in text
    assert "Everything cost" not in words(report.render(data()))


def test_busy_workers_are_averages() -> None:
    """Between two edges the workers' seconds are shared by the time, whatever order tasks end in."""
    spans = np.array([[0.0, 4.0], [1.0, 2.0], [2.0, 3.0]])
    assert report.busy_workers(spans, np.array([0.0, 2.0, 4.0, 8.0])).tolist() == [1.5, 1.5, 0.0]
    page = report.render(data(busy_s=[(0.0, 4.0), (1.0, 2.0)]))
    assert "Busy workers over the 4 s in which tasks ran: at most 2, 1.25 on average" in words(page)
    assert "Busy workers" not in report.render(data())


def test_a_page_of_many_slides_holds_some_of_their_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other pictures are not read, and all share the bytes of the page; further slides are drawn without one."""
    monkeypatch.setattr(report, "_MOST_PICTURES", 2)
    asked = []

    def pictures(slide_id: str, most_bytes: int) -> dict[str, Any]:
        asked.append((slide_id, most_bytes))
        return {"picture": {"src": IMAGE}}

    slides = [row(slide_id=f"s{number}") for number in range(5)]
    page = report.render(data(slides=slides, pictures=pictures))
    assert [slide_id for slide_id, _ in asked] == ["s0", "s1"]
    assert [("picture" in one) for one in drawn_slides(page)] == [True, True, False, False, False]
    assert "The pictures of 3 more slides are in heatmaps/<slide>.png only" in html.unescape(words(page))


def test_the_bytes_of_a_page_are_bounded(finished: Path) -> None:
    """Pictures shrink until they fit; what is too small to be seen is left out."""
    (planned, *_) = latest_plan(finished).slides
    whole = shown.pictures(finished, planned, 1_000_000)
    small = shown.pictures(finished, planned, 30_000)
    assert whole["picture"]["width"] > small["picture"]["width"] > 160
    assert sum(len(one["src"]) for one in small.values()) < 30_000 * 4 / 3 + 100
    for one in (whole, small):
        assert one["picture"]["downsample"] * one["picture"]["width"] == planned.frame.l0_width_px
    for none in (500, 0, -500):
        assert "picture" not in shown.pictures(finished, planned, none)


def test_a_damaged_picture_costs_no_report(finished: Path, tmp_path: Path) -> None:
    """What is left of a slide is shown; nothing is where both files are damaged."""
    (planned, *_) = latest_plan(finished).slides
    for folder, name in (("overviews", ".jpg"), ("heatmaps", ".preview.tif")):
        (tmp_path / folder).mkdir()
        whole = (finished / f"{folder}/{planned.slide_id}{name}").read_bytes()
        (tmp_path / f"{folder}/{planned.slide_id}{name}").write_bytes(whole[:200])
        assert shown.pictures(tmp_path, planned, 1_000_000) == {}


def test_slides_come_in_the_order_of_what_went_wrong(finished: Path) -> None:
    """Without a result, then most lesions missed, then the surest false positive, then by name; reasons are whole."""
    lesion = {"kind": "lesion", "number": 1, "reason": "", "box": [], "rings": []}
    seen, unseen = {**lesion, "best": 0.7}, {**lesion, "best": None}
    false = [[0.6, 5, 5, "false positive", 0], [0.9, 5, 5, "false positive", 0]]
    found = {
        "good": {"detections": [], "regions": [seen]},
        "fine": {"detections": [[0.9, 1, 1, "hit", 1]], "regions": [seen]},
        "false": {"detections": false, "regions": []},
        "less": {"detections": false[:1], "regions": []},
        "missed": {"detections": [], "regions": [seen, unseen]},
        "worse": {"detections": [], "regions": [unseen, unseen]},
    }
    reason = "a long reason " * 50
    rows = [row(slide_id=name) for name in found] + [row(slide_id="lost", status="failed", reason=reason)]
    index, slides = shown.describe(finished, {}, rows, found)
    assert [one["id"] for one in index] == ["lost", "worse", "missed", "false", "less", "fine", "good"]
    assert [one["problem"] for one in index[:5]] == [
        "failed",
        "2 of 2 lesions missed",
        "1 of 2 lesions missed",
        "2 false positives, up to 0.90",
        "1 false positive, up to 0.60",
    ]
    assert slides[0]["notes"][0] == reason


def test_a_finished_run_is_described_as_it_was_scored(finished: Path) -> None:
    """Detections by kind and regions found or missed add up to the rows of the scores, and lie where truth says."""
    found = shown.read_findings(finished / "evaluation")
    scored = {one["slide_id"]: one for one in _csv(finished / "evaluation/cases.csv")}
    assert set(found) == set(scored)
    for slide_id, one in found.items():
        kinds = [row[3] for row in one["detections"]]
        lesions = [region for region in one["regions"] if region["kind"] == "lesion"]
        counts = scored[slide_id]
        assert kinds.count("false positive") == int(counts["n_false_positives"])
        assert sum(region["best"] is not None for region in lesions) == int(counts["n_found"])
        assert len(lesions) == int(counts["n_lesions"])
        for region in one["regions"]:
            points = np.array([*itertools.chain(*region["rings"])]).reshape(-1, 2)
            corners = np.concatenate([points.min(axis=0), points.max(axis=0)])
            assert np.abs(corners - region["box"]).max() <= 32, "a pixel of the mask"


def _csv(path: Path) -> Iterator[dict[str, str]]:
    from small_runs import rows

    return iter(rows(path))


def test_hits_false_positives_and_ignored_detections_are_told_apart() -> None:
    """By the rules of the scores: in a lesion, outside, in isolated tumour cells, and in what is ignored."""
    tumour = np.zeros((60, 60), dtype=bool)
    tumour[10:30, 10:30] = True
    tumour[50, 50] = True
    ignored = np.zeros((60, 60), dtype=bool)
    ignored[10:30, 10:14] = True
    lesions = froc.evaluation_mask(tumour, 10.0, join_um=20.0, itc_um=60.0)
    assert (lesions.n_regions, len(lesions.itc)) == (2, 1)
    at = np.array([[0.9, 20, 20], [0.8, 5, 40], [0.7, 50, 50], [0.95, 12, 20], [0.6, 22, 22]]) * (1.0, 32.0, 32.0)
    slide = froc.SlideFindings("a", lesions, at, 32, ignored)
    told = findings.describe(findings.Regions(slide, tumour, {}), counts=True)
    assert [row[3] for row in told["detections"]] == ["hit", "false positive", "ignored", "ignored", "hit"]
    assert [(one["kind"], one["best"]) for one in told["regions"]] == [
        ("lesion", 0.9),
        ("isolated tumour cells", 0.7),
        ("ignored", None),
    ]
    assert told["regions"][0]["box"] == [320, 320, 960, 960], "as it was drawn, not as it was joined"
    matched = froc.match(slide)
    assert matched.best[0] == told["regions"][0]["best"]
    unknown = findings.describe(findings.Regions(slide, tumour, {}), counts=False)
    assert {row[3] for row in unknown["detections"]} == {""}


def test_figures_are_drawn_while_another_thread_imports_ipython(tmp_path: Path) -> None:
    """As MLflow's thread does at its first request to a server; matplotlib asks even half a module for its version."""
    module = (
        "import sys, time\nsys.draws.wait()\ntime.sleep(1)\nversion_info = (9, 0)\ndef get_ipython(): return None\n"
    )
    (tmp_path / "IPython.py").write_text(module)
    program = """
import sys, threading
import matplotlib.backends.backend_agg, matplotlib.figure
from wsiflow.run.results import page
sys.path.insert(0, sys.argv[1])
sys.draws = threading.Event()
threading.Thread(target=__import__, args=("IPython",)).start()
while "IPython" not in sys.modules: pass
sys.draws.set()
sys.stdout.buffer.write(page.picture(page.axes("x", "y")[0]))
"""
    drawn = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, check=False)
    assert drawn.stdout[:4] == b"\x89PNG", drawn.stderr.decode()


def test_outlines_are_shown_as_they_were_drawn() -> None:
    """Each ring belongs to the region that it encloses, holes too; what nothing was drawn of has the mask's outline."""
    drawn = np.array([(330.0, 325.0), (945.0, 333.0), (951.0, 950.0), (321.0, 947.0)])
    hole = np.array([(500.0, 505.0), (610.0, 500.0), (555.0, 640.0)])
    outlines = TruthOutlines(tumour=(Outline("a", "", drawn, (hole,)),))
    mask = tumour_mask(outlines, (60, 60))
    mask[50:53, 50:53] = True  # as a mask image would have it, with no outline
    lesions = froc.evaluation_mask(mask, 10.0, join_um=20.0, itc_um=0.0)
    slide = froc.SlideFindings("a", lesions, np.empty((0, 3)), 32, None)
    first, second = findings.describe(findings.Regions(slide, mask, {}, outlines), counts=True)["regions"]
    for ring, given in zip(first["rings"], (drawn, hole), strict=True):
        assert {*map(tuple, np.reshape(ring, (-1, 2)).tolist())} == {*map(tuple, given.tolist())}
    assert np.reshape(second["rings"][0], (-1, 2)).min(axis=0).tolist() == pytest.approx([1600, 1600], abs=17)
    page = shown.within_page({"width": 90_000, "height": 9, "detections": [], "regions": [first]})
    assert {*page["regions"][0]["rings"][1]} == {*first["rings"][1]}
