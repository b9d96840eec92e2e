"""Bad input ends in one clear line and the exit class of its kind, and costs no other slide anything."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from damage import overwrite
from PIL import Image
from small_runs import COARSE

from flows import cli
from wsiflow.analysis import runs
from wsiflow.heatmap import files
from wsiflow.slides import pyramid


def started(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.main(["run", *arguments, *COARSE])
    output = capsys.readouterr()
    assert "Traceback" not in output.out + output.err
    return code, output.out + output.err


@pytest.fixture(scope="module")
def drawn_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small slide with a blob of tissue, which no test changes."""
    rng = np.random.default_rng(0)
    pixels = rng.normal(240, 2, (700, 900, 3))
    pixels[200:500, 200:700] = rng.normal((190, 120, 180), 12, (300, 500, 3))
    path = tmp_path_factory.mktemp("slides") / "good.tif"
    image = np.clip(pixels, 0, 255).astype(np.uint8)
    pyramid.write_rgb(path, iter([image]), shape=(700, 900), um_px=0.243, quality=90)
    return path


@pytest.fixture
def slide(drawn_slide: Path, tmp_path: Path) -> Path:
    """The same slide in a folder of the test's own."""
    (tmp_path / "slides").mkdir()
    return Path(shutil.copy2(drawn_slide, tmp_path / "slides"))


@pytest.fixture(scope="module")
def run_of_good(drawn_slide: Path) -> Path:
    """The folder of a complete run over that slide, which no test changes."""
    out = drawn_slide.parent / "run"
    slides = manifest(drawn_slide, "good,good.tif,,0,")
    assert cli.main(["run", "dataset=manifest", slides, f"out={out}", *COARSE]) == 0
    return out


@pytest.fixture
def complete(run_of_good: Path, slide: Path, tmp_path: Path) -> Path:
    """A folder of the test's own, of a complete run over `slide` under the name ``good``."""
    return Path(shutil.copytree(run_of_good, tmp_path / "run"))


def manifest(slide: Path, *lines: str, header: str = "slide_id,path,mpp,label,annotation_path") -> str:
    path = slide.parent / "manifest.csv"
    path.write_text("\n".join([header, *lines, ""]))
    return f"dataset.manifest={path}"


def statuses(out: Path) -> dict[str, dict[str, str]]:
    with (out / "process_list.csv").open(newline="") as stream:
        return {row["slide_id"]: row for row in csv.DictReader(stream)}


def printed_by_status(out: Path, capsys) -> str:
    capsys.readouterr()
    assert cli.main(["status", str(out)]) == 0
    return capsys.readouterr().out


def test_slides_that_cannot_be_read(slide: Path, tmp_path: Path, capsys) -> None:
    """Each is listed with its file and the cause, the exit code is 20, and the good slide has its heatmap."""
    causes = {"missing": "does not exist", "empty": "0 bytes", "png": "not a slide", "text": "not a slide"}
    slide.with_name("empty.svs").write_bytes(b"")
    Image.new("RGB", (600, 600), "white").save(slide.with_name("png.svs"), "PNG")
    slide.with_name("text.svs").write_text("not a slide")
    slides = manifest(slide, "good,good.tif,,0,", *(f"{kind},{kind}.svs,,0," for kind in causes))
    out = tmp_path / "run"
    code, output = started(capsys, "dataset=manifest", slides, f"out={out}")
    assert code == 20
    for kind, cause in causes.items():
        row = statuses(out)[kind]
        assert row["status"] == "rejected"
        assert cause in row["reason"]
        assert f"{kind}.svs" in row["reason"]
        assert f"rejected: slide {kind}" in output
    assert (out / "heatmaps/good.tif").exists()
    assert not (out / "evaluation").exists()


def test_one_bad_file_in_a_folder_without_truth(slide: Path, tmp_path: Path, capsys) -> None:
    """The report shows the others and the reason, under the names of the files; nothing waits for allow_partial."""
    shutil.copy(slide, slide.with_name("Fälle (1), 100 %.tif"))
    slide.with_name("broken é.svs").write_text("not a slide")
    slide.with_name("good_mask.tif").touch()
    slide.with_name("notes.png").touch()
    out = tmp_path / "rün, (1) = #2"
    code, output = started(capsys, "dataset=folder", f"dataset.folder={slide.parent}", f"out={out}")
    assert code == 20
    first, second, third, *_ = output.splitlines()
    assert first == f"slides     4 found in {slide.parent}, 1 of them skipped"
    assert second.startswith("skipped: good_mask.tif: ")
    assert third == "1 file passed over (.png 1)"
    assert f"report     {out / 'report.html'}" in output
    page = (out / "report.html").read_text()
    for text in ("INCOMPLETE", "<b>Fälle (1), 100 %</b>", "broken é", "not a slide", "<b>good</b>"):
        assert text in page
    assert page.count("data:image/jpeg") == 2
    assert not (out / "evaluation").exists()
    assert set(statuses(out)) == {"good", "Falle _1_ 100-545b5a", "broken e-b48c3c"}


def test_allowed_partial_results_are_marked(slide: Path, tmp_path: Path, capsys) -> None:
    """With allow_partial the others are scored in a folder named PARTIAL, exit code 10; a fix completes the run."""
    slides = manifest(slide, "good,good.tif,,0,", "late,late.tif,,0,")
    out = tmp_path / "run"
    code, _ = started(capsys, "dataset=manifest", slides, f"out={out}", "allow_partial=true")
    assert code == 10
    summary = json.loads((out / "evaluation-PARTIAL/summary.json").read_text())
    assert (summary["ledger.planned"], summary["ledger.published"], summary["ledger.quarantined"]) == (2, 1, 1)
    assert "PARTIAL" in (out / "report.html").read_text()
    assert "slides: evaluation-PARTIAL/ has the scores" in printed_by_status(out, capsys)
    shutil.copy(slide, slide.with_name("late.tif"))
    before = (out / "heatmaps/good.tif").stat().st_mtime_ns
    assert started(capsys, "dataset=manifest", slides, f"out={out}")[0] == 0
    assert (out / "evaluation/summary.json").exists()
    assert (out / "heatmaps/good.tif").stat().st_mtime_ns == before, "finished work is kept"
    assert not (out / "evaluation-PARTIAL").exists()
    assert "PARTIAL" not in (out / "report.html").read_text()


def test_scores_of_an_earlier_state_are_not_shown_as_those_of_now(slide: Path, complete: Path, capsys) -> None:
    """When a broken slide joins a complete run, the scores move aside until it is fixed, and nothing reads them."""
    out = complete
    scores = (out / "evaluation/matches.json").read_bytes()
    slides = manifest(slide, "good,good.tif,,0,", "late,late.tif,,0,")
    code, output = started(capsys, "dataset=manifest", slides, f"out={out}")
    assert (code, "scores of an earlier state" in output) == (20, True)
    assert (out / "evaluation-FORMER/matches.json").read_bytes() == scores
    assert (out / "evaluation-FORMER/report.html").exists()
    assert not (out / "evaluation").exists()
    assert "INCOMPLETE" in (out / "report.html").read_text()
    assert runs.scores_folder(out) is None
    assert "not complete: it lacks 1 of ingest, 1 of evaluation" in printed_by_status(out, capsys)
    for _ in range(2):  # the second time there are partial scores already
        assert started(capsys, "dataset=manifest", slides, f"out={out}", "allow_partial=true")[0] == 10
        assert (out / "evaluation-FORMER/matches.json").read_bytes() == scores
        assert (out / "evaluation-PARTIAL/summary.json").exists()
    shutil.copy(slide, slide.with_name("late.tif"))
    assert started(capsys, "dataset=manifest", slides, f"out={out}")[0] == 0
    assert {path.name for path in out.glob("evaluation*")} == {"evaluation", "evaluations"}


def test_a_folder_of_other_slides_says_so(slide: Path, complete: Path, capsys) -> None:
    """The message names the slides of the folder, the requested ones, and what to do."""
    code, output = started(capsys, "dataset=manifest", manifest(slide, "other,good.tif,,0,"), f"out={complete}")
    assert code == 20
    assert (
        "the folder belongs to a run over other slides: good, now asked for other; give this run another out=" in output
    )


def test_no_pixel_size_names_the_line_to_add(slide: Path, tmp_path: Path, capsys) -> None:
    """The message about a slide without mpp says what to write into the manifest."""
    import tifffile

    pixels = np.full((512, 512, 3), 200, np.uint8)
    tifffile.imwrite(slide.with_name("nompp.tif"), pixels, tile=(256, 256), photometric="rgb", compression="deflate")
    slides = manifest(slide, "nompp,nompp.tif,,0,")
    code, output = started(capsys, "dataset=manifest", slides, f"out={tmp_path / 'run'}")
    assert code == 20
    assert "slide_id,path,mpp" in output
    assert "nompp,nompp.tif" in output


def test_a_slide_coarser_than_the_model_is_refused_with_the_setting(slide: Path, tmp_path: Path, capsys) -> None:
    """Pixels are enlarged only on request; the advised value is accepted, and none beyond the limit is advised."""
    shutil.copy(slide, slide.with_name("far.tif"))
    slides = manifest(slide, "good,good.tif,0.498,0,", "far,far.tif,7.29,0,")
    code, output = started(capsys, "dataset=manifest", slides, f"out={tmp_path / 'run'}")
    assert code == 20
    by_slide = statuses(tmp_path / "run")
    assert re.findall(r"geometry\.max_upsample=\S+", by_slide["good"]["reason"]) == ["geometry.max_upsample=2.1"]
    assert "max_upsample=" not in by_slide["far"]["reason"]
    assert "more than 16 times" in by_slide["far"]["reason"]
    code, output = started(
        capsys, "dataset=manifest", slides, f"out={tmp_path / 'two'}", "geometry.max_upsample=2.1", "allow_partial=true"
    )
    assert code == 10
    assert "slides     1 of 2" in output
    assert output.count("good: the manifest has 0.498 um/px, which is used; the slide states 0.243\n") == 1
    assert "the slide states 0.243" in (tmp_path / "two/report.html").read_text()


def test_a_slide_without_tissue_is_a_valid_negative_where_that_is_asked_for(
    slide: Path, tmp_path: Path, capsys
) -> None:
    """The slide has an empty map and an empty detections file, and counts in the scores with 0, which is told."""
    glass = np.clip(np.random.default_rng(1).normal(242, 1.5, (600, 600, 3)), 0, 255).astype(np.uint8)
    pyramid.write_rgb(slide.with_name("glass.tif"), iter([glass]), shape=(600, 600), um_px=0.243, quality=90)
    slides = manifest(slide, "glass,glass.tif,,0,", "good,good.tif,,0,")
    out = tmp_path / "run"
    code, output = started(capsys, "dataset=manifest", slides, f"out={out}", "evaluation.no_tissue=score")
    assert code == 0
    assert "are scored with 0" in output
    assert statuses(out)["glass"]["status"] == "no tissue"
    assert (out / "detections/glass.csv").read_bytes() == b""
    assert np.isnan(files.read_heatmap(out / "heatmaps/glass.tif")[0]).all()
    assert json.loads((out / "evaluation/summary.json").read_text())["froc.n_slides"] == 2


def test_all_errors_of_a_manifest_come_together(slide: Path, tmp_path: Path, capsys) -> None:
    """A duplicate id, a bad mpp and a missing annotation are reported together, with their lines."""
    slides = manifest(slide, "a,good.tif,,0,", "A,good.tif,,0,", "b,good.tif,zero,0,", "c,good.tif,,1,none.xml")
    code, output = started(capsys, "dataset=manifest", slides, f"out={tmp_path / 'run'}")
    assert code == 20
    for line in ("line 3", "line 4", "line 5"):
        assert line in output


def test_malformed_annotations_are_named(slide: Path, tmp_path: Path, capsys) -> None:
    """Truth that cannot be read is refused before any work, and its file is named."""
    texts = ("<ASAP_Annotations>", "", "<?xml version='1.0'?><x/>", "not xml")
    for number, text in enumerate(texts):
        slide.with_name(f"bad{number}.xml").write_text(text)
        shutil.copy(slide, slide.with_name(f"s{number}.tif"))
    slides = manifest(slide, *(f"s{number},s{number}.tif,,1,bad{number}.xml" for number in range(len(texts))))
    code, _ = started(capsys, "dataset=manifest", slides, f"out={tmp_path / 'run'}")
    assert code == 20
    for number in range(len(texts)):
        row = statuses(tmp_path / "run")[f"s{number}"]
        assert row["status"] == "rejected"
        assert f"bad{number}.xml" in row["reason"]
    assert not (tmp_path / "run/tissue").exists(), "reported before any work"


def outlined(path: Path) -> Path:
    """Write an outline of tumour on the tissue of the slide."""
    corners = "".join(f'<Coordinate X="{x}" Y="{y}"/>' for x, y in ((250, 250), (450, 250), (450, 450), (250, 450)))
    drawn = f'<Annotation Name="t" PartOfGroup="Tumor"><Coordinates>{corners}</Coordinates></Annotation>'
    path.write_text(f"<ASAP_Annotations><Annotations>{drawn}</Annotations></ASAP_Annotations>")
    return path


def masked(path: Path, *, value: int = 0, shape: tuple[int, int] = (700, 900)) -> Path:
    """Write a mask of the slide."""
    pixels = np.zeros(shape, np.uint8)
    pixels[shape[0] // 2 :, shape[1] // 2 :] = value
    Image.fromarray(pixels).save(path)
    return path


def test_broken_truth_costs_its_own_slide_alone(slide: Path, tmp_path: Path, capsys) -> None:
    """Broken truth is reported before pixels are read; other slides are scored, and one that is fixed joins them."""
    folder, out = slide.parent, tmp_path / "run"
    for name in ("cut", "xml", "size", "label"):
        shutil.copy(slide, folder / f"{name}.tif")
    (folder / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\0")  # 12 bytes
    (folder / "xml.xml").write_text("<ASAP_Annotations>")
    masked(folder / "size.png", shape=(70, 90))
    masked(folder / "label.png", value=255)
    outlined(folder / "good.xml")
    lines = ["good,good.tif,1,,good.xml", "cut,cut.tif,,cut.png,", "xml,xml.tif,1,,xml.xml"]
    lines += ["size,size.tif,0,size.png,", "label,label.tif,0,label.png,"]
    slides = manifest(slide, *lines, header="slide_id,path,label,mask_path,annotation_path")
    code, output = started(capsys, "dataset=manifest", slides, f"out={out}", "allow_partial=true")
    assert code == 10
    by_slide = statuses(out)
    causes = {
        "cut": "not a readable image",
        "xml": "not well-formed",
        "size": "px where the slide is",
        "label": "normal",
    }
    for name, cause in causes.items():
        assert by_slide[name]["status"] == "rejected"
        assert f"slide {name}, " in by_slide[name]["reason"]
        assert f"{name}.png" in by_slide[name]["reason"] or f"{name}.xml" in by_slide[name]["reason"]
        assert cause in by_slide[name]["reason"]
        assert f"rejected: slide {name}" in output.partition("PARTIAL")[0], "before the slides are predicted"
        assert not (out / f"tissue/{name}.json").exists()
    assert json.loads((out / "evaluation-PARTIAL/summary.json").read_text())["froc.n_slides"] == 1
    masked(folder / "cut.png", value=1)
    code, output = started(capsys, "dataset=manifest", slides, f"out={out}")
    assert code == 20
    assert "evaluation.mask_tumour" in output
    slides = manifest(slide, "cut,cut.tif,0,cut.png,", lines[0], header="slide_id,path,label,mask_path,annotation_path")
    assert started(capsys, "dataset=manifest", slides, f"out={out}")[0] == 0
    assert json.loads((out / "evaluation/summary.json").read_text())["froc.n_slides"] == 2


def test_truth_that_breaks_once_its_slide_is_planned(slide: Path, tmp_path: Path, capsys) -> None:
    """Truth that breaks later costs no other slide its score; once it is fixed, only scores are computed."""
    drawn, out = outlined(slide.with_name("good.xml")), tmp_path / "run"
    shutil.copy(slide, slide.with_name("b.tif"))
    arguments = ["dataset=manifest", manifest(slide, "good,good.tif,,1,good.xml", "b,b.tif,,0,"), f"out={out}"]
    assert started(capsys, *arguments)[0] == 0
    drawn.write_text("garbage")
    code, output = started(capsys, *arguments)
    assert code == 20
    assert "failed: slide good, evaluation, " in output
    assert "good.xml" in statuses(out)["good"]["reason"]
    assert started(capsys, *arguments, "allow_partial=true")[0] == 10
    assert json.loads((out / "evaluation-PARTIAL/summary.json").read_text())["froc.n_slides"] == 1
    before = {path: path.stat().st_mtime_ns for path in (out / "predictions").rglob("*.h5")}
    outlined(drawn)
    assert started(capsys, *arguments)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "predictions").rglob("*.h5")} == before


def test_truth_of_an_excluded_slide_stops_nothing(slide: Path, tmp_path: Path, capsys) -> None:
    """The truth of an excluded slide is not read, neither before the run nor after it."""
    slide.with_name("out.xml").write_text("no XML")
    shutil.copy(slide, slide.with_name("out.tif"))
    slides = manifest(slide, "good,good.tif,,0,", "out,out.tif,,1,out.xml")
    arguments = ["dataset=manifest", slides, f"out={tmp_path / 'run'}", "evaluation.exclude=[OUT]"]
    assert started(capsys, *arguments)[0] == 0
    slide.with_name("out.xml").write_text("other garbage")
    assert started(capsys, *arguments)[0] == 0


def test_weights_that_are_not_the_cards_are_refused(slide: Path, tmp_path: Path, capsys) -> None:
    """After one changed byte of the weights the message names the card and both hashes, before any slide is read."""
    import wsiflow.model

    shipped = Path(wsiflow.model.__file__).parent / "weights"
    for name in ("demo.json", "demo.safetensors"):
        shutil.copy(shipped / name, tmp_path / name)
    weights = bytearray((tmp_path / "demo.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "demo.safetensors").write_bytes(weights)
    slides = manifest(slide, "good,good.tif,,0,")
    card = f"model.card={tmp_path / 'demo.json'}"
    code, output = started(capsys, "dataset=manifest", slides, "model=card", card, f"out={tmp_path / 'run'}")
    assert code == 20
    assert "demo.json expects" in output
    assert not (tmp_path / "run/tissue").exists()


@pytest.mark.parametrize("under", ["file", "/proc"])
def test_an_output_folder_that_cannot_be_written(slide: Path, tmp_path: Path, capsys, under: str) -> None:
    """The folder is refused before any slide is read, with exit code 30."""
    (tmp_path / "file").write_text("")
    out = Path(under) / "out" if under.startswith("/") else tmp_path / under / "out"
    code, output = started(capsys, "dataset=manifest", manifest(slide, "good,good.tif,,0,"), f"out={out}")
    assert code == 30
    assert "choose another out=" in output


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("inference.refine=0.1", "inference.refine needs inference.engine=window"),
        ("inference=window inference.refine=0.1 inference.refine_from=100", "inference.refine_from is 100"),
        ("inference.strid=32", "strid"),
        ("inference.stride=30", "inference.stride"),
        ("tiles.halo_px=16", "tiles.halo_px"),
    ],
)
def test_a_bad_key_or_value_ends_at_once(tmp_path: Path, capsys, override: str, named: str) -> None:
    """The run ends with exit code 20 and the key's name, before anything is written."""
    code = cli.main(["run", f"out={tmp_path / 'run'}", "orchestrator=none", *override.split()])
    output = capsys.readouterr()
    assert code == 20
    assert named in output.err
    assert "Traceback" not in output.err
    assert not (tmp_path / "run" / "plan.json").exists()


def test_the_same_folder_with_other_settings_is_refused(slide: Path, complete: Path, capsys) -> None:
    """A folder holds one set of settings; the message names the one that differs, and what it was asked is no part."""
    slides = manifest(slide, "good,good.tif,,0,")
    code, output = started(capsys, "dataset=manifest", slides, f"out={complete}", "lesions.threshold=0.7")
    assert code == 20
    assert "lesions.threshold (0.5 there, 0.7 now)" in output
    assert cli.main(["retry", str(complete)]) == 0
    assert runs.runs_in_folders([complete]).runs[0].params["lesions.threshold"] == "0.5"
    shutil.copy(slide, slide.with_name("other.tif"))
    other = manifest(slide, "other,other.tif,,0,", "more,good.tif,,0,")
    assert started(capsys, "dataset=manifest", other, f"out={complete}")[0] == 20
    assert "ingest 1 of 1\n" in printed_by_status(complete, capsys)


def test_slides_and_truth_may_join_a_finished_run(slide: Path, tmp_path: Path, capsys) -> None:
    """A third slide, or a corrected label, gives new scores beside the former ones, and keeps all finished work."""
    out = tmp_path / "run"
    shutil.copy(slide, slide.with_name("b.tif"))
    code, output = started(capsys, "dataset=manifest", manifest(slide, "a,good.tif,,0,"), f"out={out}")
    assert (code, "the same slide" in output) == (0, False)
    before = (out / "heatmaps/a.tif").stat().st_mtime_ns
    two = manifest(slide, "a,good.tif,,0,", "b,b.tif,,0,")
    code, output = started(capsys, "dataset=manifest", two, f"out={out}")
    assert (code, "the same slide under several names, each of which counts in the scores: a, b\n" in output) == (
        0,
        True,
    )
    assert json.loads((out / "evaluation/summary.json").read_text())["froc.n_slides"] == 2
    two = manifest(slide, "a,good.tif,,0,", "b,b.tif,,1,")
    code, output = started(capsys, "dataset=manifest", two, f"out={out}")
    assert (code, "a, b, and their labels contradict each other\n" in output) == (0, True)
    assert len(list((out / "evaluations").iterdir())) == 3
    header = "slide_id,path,mpp,label,annotation_path,patient_id"
    one_patient = manifest(slide, "a,good.tif,,0,,p", "b,b.tif,,1,,p", header=header)
    assert started(capsys, "dataset=manifest", one_patient, f"out={out}")[0] == 0
    matches = json.loads((out / "evaluation/matches.json").read_text())["slides"]
    assert [one["patient"] for one in matches] == [0, 0]
    assert (out / "heatmaps/a.tif").stat().st_mtime_ns == before


def test_a_slide_replaced_after_the_plan_is_not_predicted(slide: Path, tmp_path: Path, capsys) -> None:
    """A slide with other content under a planned name is refused before its pixels are read."""
    from wsiflow.run.stages import work

    out = tmp_path / "run"
    slides = manifest(slide, "good,good.tif,,0,")
    assert started(capsys, "dataset=manifest", slides, f"out={out}", "store=none")[0] == 0
    for part in ("predictions", "receipts/predictions"):
        shutil.rmtree(out / part)
    other = np.full((700, 900, 3), 120, np.uint8)
    pyramid.write_rgb(slide.with_name("other.tif"), iter([other]), shape=(700, 900), um_px=0.243, quality=90)
    slide.with_name("other.tif").replace(slide)
    outcome = work.run_task(out / "plan.json", "predict", 0)
    assert outcome.exit_code == 20
    assert "its content has changed since the run was planned" in outcome.failure.cause


def test_another_kind_of_machine_may_not_use_the_plans_key(complete: Path, monkeypatch) -> None:
    """A worker whose libraries use other instructions fails instead of publishing numbers with other last bits."""
    from wsiflow.run.stages import work

    for part in ("predictions", "receipts/predictions"):
        shutil.rmtree(complete / part)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    outcome = work.run_task(complete / "plan.json", "predict", 0)
    assert outcome.exit_code == 30
    assert "gives other last bits" in outcome.failure.cause


def test_a_hash_in_the_manifest_is_compared_even_later(slide: Path, complete: Path, capsys) -> None:
    """A SHA-256 added after the first run is checked against what was hashed then."""
    slides = manifest(slide, f"good,good.tif,,0,,{'0' * 64}", header="slide_id,path,mpp,label,annotation_path,sha256")
    code, output = started(capsys, "dataset=manifest", slides, f"out={complete}")
    assert code == 20
    assert "the manifest says 000" in output


def test_no_score_beyond_the_slide(slide: Path, tmp_path: Path, capsys) -> None:
    """Tiles that reach past the edge keep the cells whose centre is on the slide, and no others."""
    out = tmp_path / "run"
    slides = manifest(slide, "good,good.tif,,0,")
    assert started(capsys, "dataset=manifest", slides, f"out={out}", "tissue=all")[0] == 0
    heat, _ = files.read_heatmap(out / "heatmaps/good.tif")
    on_slide = np.isfinite(heat)
    assert on_slide[:6, :8].all(), "700 x 900 px: centres at 56, 168 .. 616 and .. 840"
    assert on_slide.sum() == 6 * 8


@pytest.mark.parametrize(
    "arguments",
    [
        ["synth", "{tmp}/x", "--size-px", "100"],
        ["synth", "{tmp}/file"],
        ["verify", "{tmp}/damaged"],
        ["task", "{tmp}/list.json", "0"],
        ["evaluate", "--manifest", "{tmp}", "--detections", "{tmp}", "--out", "{tmp}/o"],
        ["evaluate", "--manifest", "{tmp}/none.csv", "--detections", "{tmp}", "--out", "{tmp}/o", "--um-px", "-1"],
    ],
)
def test_commands_end_in_one_line(tmp_path: Path, capsys, arguments: list[str]) -> None:
    """A command with bad input ends with one line, and with the exit code of an error class."""
    (tmp_path / "file").write_text("")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "damaged/receipts").mkdir(parents=True)
    (tmp_path / "damaged/receipts/a.bin.json").write_text('{"path"')
    code = cli.main([argument.format(tmp=tmp_path) for argument in arguments])
    output = capsys.readouterr().err
    assert code in (20, 30, 40, 50)
    assert len(output.splitlines()) == 1
    assert "Traceback" not in output


def test_verify_finds_the_damaged_file(complete: Path, capsys) -> None:
    """One flipped bit in a heatmap gives exit code 40 and the file's name."""
    assert cli.main(["verify", str(complete)]) == 0
    heat = complete / "heatmaps/good.tif"
    data = bytearray(heat.read_bytes())
    data[len(data) // 2] ^= 4
    overwrite(heat, bytes(data))
    assert cli.main(["verify", str(complete)]) == 40
    assert "good.tif" in capsys.readouterr().err
