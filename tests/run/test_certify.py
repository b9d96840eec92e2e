"""The choice of the engine, which is made once, and the certificates, which measure its accuracy on every slide."""

import contextlib
import csv
import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openslide
import pytest
import torch
from damage import overwrite
from small_runs import attempts
from torch import nn

from flows import compose as command
from flows.cli import main
from wsiflow.heatmap import files
from wsiflow.model import from_module, save, scorer, scoring
from wsiflow.model.architectures.registry import build
from wsiflow.model.choice import Choice
from wsiflow.model.classifier import load
from wsiflow.model.engines import engine
from wsiflow.plan import geometry
from wsiflow.run import shards
from wsiflow.run.plan import latest_plan, read_plan
from wsiflow.run.stages import certify, fastest, precisions
from wsiflow.slides import pyramid
from wsiflow.slides.synthetic import dataset
from wsiflow.system.machine import cpu_supports_bf16

FAST = ["executor=inline", "orchestrator=none", "tracking=off", "evaluation.bootstrap=0", "dense.windows=24"]


@pytest.fixture(scope="module")
def tiny_slide(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The overrides that choose a slide of 2 x 2 tiles of tissue; GoogLeNet is slow."""
    path = tmp_path_factory.mktemp("slide") / "s.tif"
    spec = dataset.plan_slide("micro", width_px=1000, height_px=900, seed=3)
    corner = np.ascontiguousarray(np.concatenate(list(dataset._bands(spec)))[:448, :448])
    pyramid.write_rgb(path, iter([corner]), shape=corner.shape[:2], um_px=0.243, quality=90)
    return ["dataset=single", f"dataset.path={path}"]


def wsiflow(slides: Path | list[str], out: Path, *more: str) -> int:
    one = ["dataset=manifest", f"dataset.manifest={slides}", "dataset.limit=1"]
    return main(["run", *(one if isinstance(slides, Path) else slides), f"out={out}", *FAST, *more])


def choice_of(out: Path) -> dict:
    (record,) = (out / "engine").glob("*.json")
    return json.loads(record.read_text())


def summary(out: Path) -> dict[str, float]:
    return json.loads((out / "evaluation/summary.json").read_text())


def heat(out: Path, slide_id: str = "*") -> np.ndarray:
    (path,) = (path for path in (out / "heatmaps").glob(f"{slide_id}.tif") if "preview" not in path.name)
    return files.read_heatmap(path)[0]


@pytest.fixture(scope="module")
def googlenet(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The overrides that choose a GoogLeNet with random weights."""
    torch.manual_seed(0)
    network = build("googlenet", 2, dropout=0.5)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    folder = tmp_path_factory.mktemp("googlenet")
    return ["model=card", f"model.card={save_card(network, folder)}"]


class Strict(NamedTuple):
    """Three starts of a run that exceeds its tolerance: twice as it is, and once with ``dense.on_excess=report``.

    Attributes:
        out: The folder of the run.
        codes: Their exit codes.
        said: Their outputs.
        scored: Whether there were scores after each.
    """

    out: Path
    codes: list[int]
    said: list[str]
    scored: list[bool]


TOLERANCE = 0.02  # the scores of this slide differ by 0.032 on average, by 0.008 where windows share the first layers
PADDED = ["inference.stride=32", "dense.windows=8", f"dense.tolerance={TOLERANCE}"]


@pytest.fixture(scope="module")
def strict(tiny_slide: list[str], googlenet: list[str], tmp_path_factory: pytest.TempPathFactory) -> Strict:
    """A run of GoogLeNet that exceeds its tolerance, predicted and certified once for all tests."""
    found = Strict(tmp_path_factory.mktemp("strict") / "run", [], [], [])
    for more in ([], [], ["dense.on_excess=report"]):
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
            found.codes.append(wsiflow(tiny_slide, found.out, *googlenet, *PADDED, *more))
        found.said.append(said.getvalue())
        found.scored.append((found.out / "evaluation").exists())
    return found


@pytest.fixture(scope="module")
def usual(small_slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run at stride 56 with default settings."""
    out = tmp_path_factory.mktemp("usual") / "run"
    assert wsiflow(small_slides, out, "inference.stride=56", "inference.backend=openvino") == 0
    return out


def save_card(network: nn.Module, folder: Path) -> Path:
    fields = json.loads((Path(engine.__file__).parents[1] / "weights/demo.json").read_text())
    fields = {name: value for name, value in fields.items() if name not in {"weights", "sha256", "probe"}}
    fields |= {"name": "googlenet", "architecture": "googlenet", "architecture_args": {"dropout": 0.5}}
    return save.save(network.eval(), fields, folder)


def test_a_network_that_pads_is_run_with_context_and_measured(strict: Strict) -> None:
    """GoogLeNet gets 96 px of context; its dense scores differ from single windows, and the summary says how much."""
    choice = choice_of(strict.out)["choice"]
    assert (choice["engine"], choice["context_px"], choice["exact"]) == ("dense", 96, False)
    assert choice["halo_px"] == 112 - 16 + 96
    found = summary(strict.out)
    assert TOLERANCE < found["dense.mean_abs_diff"] < found["dense.max_abs_diff"] < 0.5
    assert found["dense.n"] == 8


def test_beyond_the_tolerance_a_run_stops_and_names_what_would_pass(
    strict: Strict, tiny_slide: list[str], googlenet: list[str], tmp_path: Path
) -> None:
    """Nothing is scored; the advice was tried on the same windows, and a run that follows it passes."""
    first, again, reported = strict.said
    assert (strict.codes, strict.scored) == ([40, 40, 0], [False, False, True])
    assert "scores differ from single windows in fp32: mean abs diff is" in first
    assert first.count("looking for a setting that keeps dense.tolerance") == 1
    assert "looking for" not in again + reported, "once for a run"
    assert "advice     set dense.share_until=" in again
    assert summary(strict.out)["certificate.slides_beyond"] == 1
    assert "slides beyond the limits: 1" in reported
    cut = first.split("set dense.share_until=")[1].split()[0]
    assert wsiflow(tiny_slide, tmp_path / "shared", *googlenet, *PADDED, f"dense.share_until={cut}") == 0
    assert summary(tmp_path / "shared")["dense.mean_abs_diff"] <= TOLERANCE


def test_a_stopped_run_stops_again_wherever_it_is_restarted(
    strict: Strict, tiny_slide: list[str], googlenet: list[str], tmp_path: Path
) -> None:
    """A folder that was finished with ``dense.on_excess=report`` is not accepted without it, by no executor."""
    out = Path(shutil.copytree(strict.out, tmp_path / "run"))
    before = attempts(out)
    usual = ["orchestrator=none", "tracking=off", "evaluation.bootstrap=0", *googlenet, *PADDED]
    for executor in (["executor=inline"], ["executor=process", "executor.workers=1"]):
        assert main(["run", *tiny_slide, f"out={out}", *usual, *executor]) == 40
        assert not (out / "evaluation").exists()
    after = attempts(out)
    assert {name: after[name] for name in before} == before, "nothing is computed again"


def test_windows_are_cut_where_their_scores_belong(usual: Path) -> None:
    """Every window that is run alone has the pixels around the centre of its cell, to the pixel."""
    plan = latest_plan(usual)
    planned, drawn = plan.slides[0], certify.sample(usual, plan, 0).drawn
    windows = certify.windows_of(usual, plan, planned, drawn, context_px=0)
    compared = 0
    with openslide.OpenSlide(planned.path) as slide:
        for window, (row, col) in zip(windows, drawn.cells, strict=True):
            x, y = geometry.l0_from_h(planned.frame, np.array([[col, row]], np.float64))[0].astype(int) - 112
            if 0 <= x <= slide.dimensions[0] - 224 and 0 <= y <= slide.dimensions[1] - 224:
                expected = np.asarray(slide.read_region((x, y), 0, (224, 224)))[..., :3]
                assert np.array_equal(window, expected)
                compared += 1
    assert compared > 10


def test_certificates_of_other_truth_and_of_earlier_versions_are_replaced(
    small_slides: Path, usual: Path, tmp_path: Path
) -> None:
    """The certificate alone is computed again, and its bytes are what they were."""
    out = Path(shutil.copytree(usual, tmp_path / "run"))
    (certificate,), (receipt,) = (out / "certificates").iterdir(), (out / "receipts/certificates").iterdir()
    published, before = certificate.read_bytes(), attempts(out)
    overwrite(certificate, '{"windows": {"expected": [0.5], "scores": [0.1]}}')
    overwrite(receipt, receipt.read_text().replace('"key": "', '"key": "f'))
    assert wsiflow(small_slides, out, "inference.stride=56", "inference.backend=openvino") == 0
    assert certificate.read_bytes() == published
    after = attempts(out)
    assert {Path(name).parent.name for name in before if after[name] != before[name]} == {"certificates"}


def test_a_run_that_erases_tumour_does_not_pass(
    small_slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every high score of the dense engine is lost; the annotated lesions are found by windows that are run alone."""
    with small_slides.open(newline="") as stream:
        row = next(row for row in csv.DictReader(stream) if row["annotation_path"])
    one = tmp_path / "one.csv"
    paths = [small_slides.parent / row[name] for name in ("path", "annotation_path")]
    one.write_text(f"slide_id,path,annotation_path,label\ns,{paths[0]},{paths[1]},tumour\n")
    score = scoring.DenseScorer.score

    def erasing(*given: object) -> scoring.TileScores:
        found = score(*given)
        return found._replace(prob=np.where(found.prob > 0.3, np.float32(0), found.prob))

    monkeypatch.setattr(scoring.DenseScorer, "score", erasing)
    assert wsiflow(one, tmp_path / "run", "inference.stride=112") == 40
    assert re.search(r"(a lesion is|\d+ lesions are) lost: no score in it exceeds 0.5", capsys.readouterr().err)
    assert wsiflow(one, tmp_path / "run", "inference.stride=112", "dense.on_excess=report") == 0
    found = summary(tmp_path / "run")
    assert found["certificate.lesions_lost"] > 0
    assert found["certificate.froc_difference"] < 0


def test_windows_that_were_not_refined_are_certified(
    tiny_slide: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Coarse scores that stand for their surroundings are compared with those of single windows."""
    refined = ["inference=window", "inference.stride=56", "inference.refine=1", "dense.tolerance=0.00001"]
    assert wsiflow(tiny_slide, tmp_path / "run", *refined) == 40
    assert "window fp32 scores differ from single windows in fp32: mean abs diff is" in (
        said := capsys.readouterr().err
    )
    assert "set inference.refine=0, in another out= folder" in said
    assert wsiflow(tiny_slide, tmp_path / "run", *refined, "dense.on_excess=report") == 0
    assert summary(tmp_path / "run")["refine.mean_abs_diff"] > 0.00001


def test_where_windows_do_not_overlap_they_are_run(small_slides: Path, tmp_path: Path) -> None:
    """At a stride of a whole window dense maps save nothing; the run names its choice and the reason."""
    assert wsiflow(small_slides, tmp_path / "run", "inference.stride=224") == 0
    found = choice_of(tmp_path / "run")
    assert found["choice"]["engine"] == "window"
    assert "share too little" in found["told"]
    assert not (tmp_path / "run/certificates").exists(), "there is nothing to compare"


def test_a_halo_too_small_for_a_network_that_pads_means_windows(
    tiny_slide: list[str], googlenet: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The patches of the reference leave GoogLeNet no context, so that single windows are run."""
    assert wsiflow(tiny_slide, tmp_path / "run", *googlenet, "tiles=patch", "inference.stride=112") == 0
    assert choice_of(tmp_path / "run")["choice"]["engine"] == "window"
    said = capsys.readouterr().out
    assert "window engine, openvino fp32: windows are run one by one: a halo of 112 px leaves" in said


def test_memory_bounds_rows_as_well_as_columns() -> None:
    """With little memory blocks are lower and shorter; where a single tile is too much, windows are run."""

    def chosen(*more: str) -> dict:
        config = command.compose_config(["out=unused", "tiles.memory_mb=100", *more])
        return fastest.choose_engine(load(config.model), config, threads=1)

    tight, fine = chosen("inference.stride=16"), chosen("inference.stride=1")
    assert tight["choice"]["engine"] == "dense"
    assert 1 <= tight["choice"]["block_rows"] < 7
    assert fine["choice"]["engine"] == "window"
    assert "a single tile takes more than tiles.memory_mb=100" in fine["told"]


def test_batches_of_large_windows_are_smaller() -> None:
    """A call takes as many windows as surely fit into the memory of a worker; a block as large as a window is run."""
    config = command.compose_config(["out=unused"])
    demo = load(config.model)
    facts = scorer.describe(demo, 16)._replace(activation_bytes_px=100.0)
    for side, batch in ((32, 32), (224, 32), (512, 6), (1024, 1), (2048, 1)):
        large = dataclasses.replace(demo, window_px=side, input_px=side)
        assert fastest._plan_windows(large, config).batch == batch
        assert fastest._plan_blocks(large, config, facts).engine == "dense"
    little = command.compose_config(["out=unused", "tiles.memory_mb=100", "inference=window"])
    choice = fastest.choose_engine(demo, little, threads=1)
    assert choice["choice"]["batch"] == 3
    assert choice["told"].endswith("; batches of 3, as 32 windows may take more than tiles.memory_mb")


class _Gated(nn.Module):
    """A small network in which a gate that needs the whole window ends what windows can share."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.ReLU(), nn.Conv2d(16, 8, 3))
        self.gate, self.wide, self.last = nn.Linear(8, 8), nn.Conv2d(8, channels, 3), nn.Conv2d(channels, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        return self.last(torch.relu(self.wide(x))).mean((2, 3))


def test_windows_share_a_part_where_the_whole_cannot_run_over_blocks() -> None:
    """The deepest layer is chosen where it saves a tenth of the multiplications; the reason names what ends it."""
    demo = load(command.compose_config(["out=unused"]).model)

    def chosen(channels: int, *more: str) -> dict:
        config = command.compose_config(["out=unused", "inference.stride=56", *more])
        torch.manual_seed(1)
        network = dataclasses.replace(demo, module=_Gated(channels).eval(), identity=f"gated {channels}")
        return fastest.choose_engine(network, config, threads=1)

    partly = chosen(4)
    choice = partly["choice"]
    assert (choice["engine"], choice["share_until"], choice["exact"]) == ("dense", "stem", True)
    assert re.search(
        r"share the network up to stem, 8\d% .* saves 8\d% .* layer mul .*squeeze-and-excite", partly["told"]
    )
    assert partly["cuts"][0] == "stem"
    assert chosen(4, "dense.share_until=stem.1")["choice"]["share_until"] == "stem.1"
    whole = chosen(4, "inference.precision=int8")
    assert (whole["choice"]["engine"], whole["choice"]["share_until"]) == ("window", "")
    little = chosen(512)
    assert little["choice"]["engine"] == "window"
    assert re.search(r"up to stem would save \d% of their multiplications .* layer mul", little["told"])
    assert "With dense.local=true windows would share all layers" in little["told"]
    assert chosen(512, "dense.share_until=stem")["choice"]["share_until"] == "stem"
    local = chosen(512, "dense.local=true")
    choice = local["choice"]
    assert (choice["engine"], choice["share_until"], choice["exact"], choice["local"]) == ("dense", "", False, True)
    assert "means over a window are taken around every place" in local["told"]
    assert "local" not in partly["choice"], "records of other runs stay as they were"


OWN_INT8 = ["inference.precision=int8", "inference.calibration=own"]


@pytest.fixture(scope="module")
def quantised(small_slides: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of two equal runs in int8, with colours fitted, over a slide of glass and one of tissue."""
    folder = tmp_path_factory.mktemp("int8")
    glass = np.full((1000, 1200, 3), 244, np.uint8)
    pyramid.write_rgb(folder / "blank.tif", iter([glass]), shape=glass.shape[:2], um_px=0.243, quality=90)
    with small_slides.open(newline="") as stream:
        other = next(csv.DictReader(stream))
    manifest = folder / "two.csv"
    manifest.write_text(f"slide_id,path\nblank,blank.tif\nother,{small_slides.parent / other['path']}\n")
    slides = ["dataset=manifest", f"dataset.manifest={manifest}"]
    outs = folder / "a", folder / "b"
    for out in outs:
        assert wsiflow(slides, out, "inference.stride=32", "stain=macenko", *OWN_INT8) == 0
    return outs


def test_a_slide_without_tissue_is_a_slide(quantised: tuple[Path, Path]) -> None:
    """A slide of glass has no colours to fit, no windows to certify and no blocks to calibrate on; it is no failure."""
    with (quantised[0] / "process_list.csv").open(newline="") as stream:
        assert {row["slide_id"]: row["status"] for row in csv.DictReader(stream)} == {
            "blank": "no tissue",
            "other": "done",
        }


def test_int8_is_calibrated_on_the_runs_own_tissue_where_that_is_asked_for(quantised: tuple[Path, Path]) -> None:
    """Two runs give the same bytes, near those of fp32, and certificates."""
    found = summary(quantised[0])
    assert 0 < found["precision.mean_abs_diff"] <= 0.02
    assert found["precision.flips"] <= 0.02
    first, second = (heat(out, "other") for out in quantised)
    assert np.array_equal(first, second, equal_nan=True)


def test_int8_is_calibrated_once_on_named_slides(
    small_slides: Path,
    tiny_slide: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another run with other slides has the same network without computing it; a named slide is never under test."""
    monkeypatch.setenv("WSIFLOW_CACHE", str(tmp_path / "cache"))
    calls, quantise = [], scorer.quantise
    monkeypatch.setattr(scorer, "quantise", lambda *given: calls.append(given) or quantise(*given))
    with small_slides.open(newline="") as stream:
        row = next(csv.DictReader(stream))
    named = tmp_path / "named.csv"
    named.write_text(f"slide_id,path\nother,{small_slides.parent / row['path']}\n")
    int8 = ["inference.precision=int8", f"inference.calibration={named}", "inference.stride=112"]
    for out in ("a", "b"):
        assert wsiflow(tiny_slide, tmp_path / out, *int8) == 0
    first, second = ((tmp_path / out / "engine").glob("int8-*.zip") for out in ("a", "b"))
    assert next(first).read_bytes() == next(second).read_bytes()
    assert len(calls) == 1
    assert wsiflow(small_slides, tmp_path / "c", *int8) == 20
    assert "int8 would be calibrated on a slide under test" in capsys.readouterr().err


@pytest.mark.skipif(not cpu_supports_bf16(), reason="this CPU has no bf16")
def test_bf16_is_certified_against_fp32(small_slides: Path, tmp_path: Path) -> None:
    """Both comparisons are within the limits: the mean difference is at most 0.002, the largest at most 0.02."""
    assert wsiflow(small_slides, tmp_path / "run", "inference.precision=bf16", "inference.stride=32") == 0
    found = summary(tmp_path / "run")
    for kind in ("dense", "precision"):
        assert 0 < found[f"{kind}.mean_abs_diff"] <= 0.002
        assert found[f"{kind}.max_abs_diff"] <= 0.02


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Core-seconds by precision, in place of those that are measured: no test depends on how fast the machine is."""
    spent = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0}

    def core_s(source: Path) -> float:
        measured = precisions_core_s(source)
        assert measured > 0
        return spent[read_plan(source).settings.choice.precision]

    precisions_core_s = precisions._core_s
    monkeypatch.setattr(precisions, "_core_s", core_s)


AUTO = ["inference.precision=auto", "inference.stride=112"]


@pytest.mark.usefixtures("costs")
def test_auto_takes_the_cheapest_that_is_certified_and_keeps_it(
    tiny_slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was measured is published and told, and a run that is started again keeps its choice.

    So does a run that was killed between file and receipt: repeated measurements would differ.
    """
    named = tmp_path / "named.csv"
    named.write_text(f"slide_id,path\nother,{tiny_slides.parent / 'b.tif'}\n")
    auto = [*AUTO, "inference.backend=auto", f"inference.calibration={named}"]
    assert wsiflow(tiny_slides, tmp_path / "run", *auto) == 0
    first = choice_of(tmp_path / "run")
    assert (first["choice"]["backend"], first["choice"]["precision"]) == ("openvino", "int8")
    assert len(first["measured_s"]) >= 2
    found = first["trial"]["candidates"]
    assert set(found) == ({"fp32", "bf16", "int8"} if cpu_supports_bf16() else {"fp32", "int8"})
    assert found["int8"]["exceeded"] == {}
    assert 0 < found["int8"]["deviation"]["precision"]["mean_abs_diff"] <= 0.02
    assert latest_plan(tmp_path / "run").settings.calibration == tuple(first["calibration"])
    said = capsys.readouterr().out
    told = "precision int8 was chosen: 4.0 times as fast as fp32 on 1 block of slide a, "
    assert said.count(told) == 2, "it is told when it is chosen, and in the summary"
    assert wsiflow(tiny_slides, tmp_path / "run", *auto) == 0
    (receipt,) = (tmp_path / "run/receipts/engine").glob("????????????.json.json")
    receipt.unlink()
    assert wsiflow(tiny_slides, tmp_path / "run", *auto) == 0
    assert choice_of(tmp_path / "run") == first
    assert receipt.exists()


@pytest.mark.parametrize(
    ("exceeded", "fp32", "expected"),
    [
        ({}, {}, "int8"),
        ({"int8": {"precision": ["mean"]}}, {}, "bf16"),
        ({"int8": {"windows": ["mean"]}, "bf16": {"precision": ["max"]}}, {}, "fp32"),
        ({"int8": {"windows": ["mean"]}}, {"windows": ["mean"]}, "int8"),  # sharing layers does it, not the precision
        ({"int8": {"windows": ["mean"], "precision": ["mean"]}}, {"windows": ["mean"]}, "bf16"),
    ],
)
def test_a_precision_that_is_not_certified_is_not_taken(
    usual: Path, monkeypatch: pytest.MonkeyPatch, exceeded: dict, fp32: dict, expected: str
) -> None:
    """The next one is, and a slower one than fp32, or one that could not be measured, never."""
    choice = Choice(**choice_of(usual)["choice"])
    monkeypatch.setattr(
        precisions, "_verdict", lambda source: precisions.Verdict({"fp32": fp32, **exceeded}.get(source.name, {}), {})
    )
    trials = [
        precisions.Trial(choice._replace(precision=name), Path(name), core_s)
        for name, core_s in (("fp32", 4.0), ("bf16", 2.0), ("int8", 1.0))
    ]
    assert precisions._cheapest(trials)[0].precision == expected
    slow = [trials[0], trials[1]._replace(core_s=5.0), trials[2]._replace(cause="it cannot be run")]
    assert precisions._cheapest(slow)[0].precision == "fp32"


@pytest.mark.usefixtures("costs")
@pytest.mark.skipif(not cpu_supports_bf16(), reason="this CPU has no bf16")
def test_a_precision_is_not_blamed_for_what_sharing_layers_does(
    tiny_slide: list[str], googlenet: list[str], tmp_path: Path
) -> None:
    """A network that pads exceeds the tolerance in fp32 as well; bf16 is held to fp32 alone."""
    more = ["inference.precision=auto", *PADDED, "dense.on_excess=report"]
    assert wsiflow(tiny_slide, tmp_path / "run", *googlenet, *more) == 0
    record = choice_of(tmp_path / "run")
    assert record["choice"]["precision"] == "bf16"
    assert set(record["trial"]["candidates"]["fp32"]["exceeded"]) == {"windows"}
    assert record["trial"]["candidates"]["bf16"]["exceeded"] == {}


def test_auto_never_calibrates_on_slides_under_test(
    small_slides: Path, usual: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A manifest with one of them is refused before any work, and the run's own tissue makes int8 no candidate."""
    assert wsiflow(small_slides, tmp_path / "a", *AUTO, f"inference.calibration={small_slides}") == 20
    assert "int8 would be calibrated on a slide under test" in capsys.readouterr().err
    assert not (tmp_path / "a/engine").exists()
    own = command.compose_config([*AUTO, "inference.calibration=own"])
    assert "not under test" in precisions._obstacle_to_int8(own, Choice(**choice_of(usual)["choice"]))


def test_auto_is_fp32_where_no_slide_has_tissue(tmp_path: Path) -> None:
    """A damaged slide and glass are left to the tasks of the run, and it is told why nothing was tried."""
    glass = np.full((600, 500, 3), 240, np.uint8)
    pyramid.write_rgb(tmp_path / "glass.tif", iter([glass]), shape=glass.shape[:2], um_px=0.243, quality=90)
    (tmp_path / "damaged.tif").write_bytes((tmp_path / "glass.tif").read_bytes()[:200])
    (tmp_path / "m.csv").write_text("slide_id,path\ndamaged,damaged.tif\nglass,glass.tif\n")
    slides = ["dataset=manifest", f"dataset.manifest={tmp_path / 'm.csv'}", f"out={tmp_path / 'run'}"]
    config = command.compose_config([*slides, *FAST, *AUTO, f"inference.calibration={tmp_path / 'other.csv'}"])
    (tmp_path / "other.csv").write_text("slide_id,path\nother,other.tif\n")
    (tmp_path / "other.tif").write_bytes(b"other")
    precisions.choose(shards.begin(config), 0)
    record = choice_of(tmp_path / "run")
    assert record["choice"]["precision"] == "fp32"
    assert record["told"].endswith("could not be tried, none of 2 slides could be read and has tissue")
    assert not list((tmp_path / "run").rglob("slides"))


def test_without_certificates_auto_is_fp32(
    tiny_slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores that nothing compares with fp32 are in fp32, and the run says why."""
    assert wsiflow(tiny_slides, tmp_path / "run", *AUTO, "dense.windows=0") == 0
    assert choice_of(tmp_path / "run")["choice"]["precision"] == "fp32"
    assert "precision fp32: dense.windows=0" in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_every_backend_gives_the_same_map(small_slides: Path, usual: Path, tmp_path: Path, backend: str) -> None:
    """ONNX Runtime and PyTorch agree with OpenVINO to rounding."""
    assert wsiflow(small_slides, tmp_path / "run", f"inference.backend={backend}", "inference.stride=56") == 0
    np.testing.assert_allclose(heat(tmp_path / "run"), heat(usual), atol=5e-5)


@pytest.mark.parametrize("method", ["reinhard", "macenko", "vahadane"])
def test_colours_are_fitted_once_per_slide(small_slides: Path, usual: Path, tmp_path: Path, method: str) -> None:
    """The fit is published, the scores change, and dense still equals windows."""
    assert wsiflow(small_slides, tmp_path / "run", "inference.stride=56", f"stain={method}") == 0
    (fit,) = (tmp_path / "run/stain").glob("*.json")
    assert json.loads(fit.read_text())["fit"]["method"] == method
    found = summary(tmp_path / "run")
    assert found["stain.failures"] == 0
    assert found["cost.stain_core_s"] > 0
    assert found["dense.max_abs_diff"] <= 1e-5
    assert np.nanmax(np.abs(heat(tmp_path / "run") - heat(usual))) > 1e-3


def test_patches_without_a_fit_are_counted_with_their_places(tiny_slides: Path, tmp_path: Path) -> None:
    """stain.per_patch on the whole slide: glass has no stains; by policy it keeps its colours, and the run lists it."""
    glass = ["tissue=all", "tiles=patch", "inference.stride=112", "stain=macenko", "stain.per_patch=true"]
    assert wsiflow(tiny_slides, tmp_path / "fail", *glass) == 20
    assert wsiflow(tiny_slides, tmp_path / "raw", *glass, "stain.on_failure=raw") == 0
    with (tmp_path / "raw/stain_failures.csv").open(newline="") as stream:
        listed = list(csv.DictReader(stream))
    assert len(listed) == summary(tmp_path / "raw")["stain.failures"] > 0
    assert all(int(row["l0_x"]) % 224 == 0 and row["reason"] for row in listed)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["dense.share_until=pool9"], "dense.share_until is 'pool9'"),
        (["inference.backend=torch", "inference.precision=int8"], "int8 is not a precision of backend torch"),
        (["stain=macenko", "stain.per_patch=true"], "stain.per_patch"),
        (["inference.precision=int8", "dense.share_until=pool3"], "int8 is not supported"),
        (["inference.precision=int8", "dense.windows=0"], "have to be compared with fp32"),
        (["inference.precision=int8"], "inference.calibration names no slides to calibrate int8 on"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    small_slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    """The run ends with one line and exit code 20, and without a plan."""
    assert wsiflow(small_slides, tmp_path / "run", *overrides) == 20
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run/plan.json").exists()


def test_windows_that_only_run_alone_get_a_stride_that_fits(
    tiny_slide: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a window where no stride was given; a given one is kept, and its cost and that of half a window are said."""
    torch.manual_seed(1)
    from_module(
        _Gated(512), classes=["a", "b"], window=64, spacing=0.243, mean=(0.5,) * 3, std=(0.2,) * 3, folder=tmp_path
    )
    model = ["model=card", f"model.card={tmp_path}/model.json"]
    assert wsiflow(tiny_slide, tmp_path / "usual", *model) == 0
    assert heat(tmp_path / "usual").shape == (14, 14)
    assert "windows are run one by one, 32 px apart (inference.stride_alone): " in capsys.readouterr().out
    assert "window_s" not in choice_of(tmp_path / "usual")
    assert main(["plan", *tiny_slide, *model, f"out={tmp_path / 'given'}", *FAST, "inference.stride=16"]) == 0
    assert choice_of(tmp_path / "given")["choice"]["stride_px"] == 16
    said = capsys.readouterr().out
    assert re.search(r"784 windows run one by one, about \S+ core-hours at stride 16; inference\.stride=32 would", said)


@pytest.mark.parametrize("more", [[], ["inference=window"], ["inference.stride=32"]])
def test_files_of_runs_that_share_windows_do_not_have_the_stride_of_others(more: list[str]) -> None:
    """What ships runs as before, whether a stride was given or not."""
    config = command.compose_config(["out=unused", *more])
    assert config.inference.stride_alone == 0
    assert "stride_alone" not in config.model_dump(mode="json")["inference"]
