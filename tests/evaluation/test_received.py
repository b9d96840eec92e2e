"""Detections of other programs: units, places and columns that are refused or doubted."""

import numpy as np
import pytest
from worked_examples import painted, png

from flows.cli import main
from wsiflow.errors import InputError
from wsiflow.evaluation import evaluate
from wsiflow.evaluation.protocol import EvaluationParams
from wsiflow.slides import manifest, pyramid

SIZE = (1200, 600)  # width and height, at 32 level-0 px per mask px
LESION = (2, 8, 17, 37)  # rows and columns of the mask: level-0 x 544 to 1,184, y 64 to 256


def params(**changes):
    """Return the rules of a small evaluation at 0.5 um per pixel."""
    values = {"name": "test", "downsample": 32, "l0_um_px": None, "join_um": 75.0, "itc_um": 20.0}
    return EvaluationParams(**{**values, "exclude": [], "exclude_froc": [], "bootstrap": 0, **changes})


@pytest.fixture
def evaluated(tmp_path):
    """Return a function that scores detections of a tumour slide, and of a normal one, whose slides are there."""
    (tmp_path / "d").mkdir()
    png(tmp_path / "a.png", painted((19, 38), [LESION]))
    png(tmp_path / "b.png", painted((19, 38), []))

    def score(text, *, normal="", slides=True, unit="px", label="tumor", um_px=0.5, **changes):
        for name, content in (("a", text), ("b", normal)):
            (tmp_path / "d" / f"{name}.csv").write_text(content)
            if slides:
                glass = np.full((SIZE[1], SIZE[0], 3), 240, np.uint8)
                pyramid.write_rgb(tmp_path / f"{name}.tif", iter([glass]), shape=SIZE[::-1], um_px=um_px, quality=80)
        mpp = "" if slides else "0.5"
        lines = ["slide_id,path,label,mask_path,mpp", f"a,a.tif,{label},a.png,{mpp}", f"b,b.tif,normal,b.png,{mpp}"]
        (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
        cases = manifest.read_manifest(tmp_path / "m.csv")
        return evaluate.evaluate_folder(cases, tmp_path / "d", params(**changes), seed=0, mask_downsample=1, unit=unit)

    return score


def test_what_is_right_needs_no_word(evaluated):
    """A hit and a false positive, in px and in um; the slides state the spacing, and normal slides are counted."""
    px, um = evaluated(".9,800,100\n.5,10,10\n"), evaluated(".9,400,50\n.5,5,5\n", unit="um")
    for scores in (px, um):
        assert scores.remarks == ()
        assert scores.cases[0]["n_found"] == 1
        assert [scores.metrics[f"froc.n_{what}"] for what in ("slides", "normal", "lesions")] == [2, 1, 1]


@pytest.mark.parametrize("um_px", [25_400 / 72, 0.06])
def test_a_pixel_size_that_a_run_doubts_is_not_used(evaluated, um_px):
    """The resolution of a printer, or a slide smaller than a grain of sand: the manifest has to give the spacing."""
    with pytest.raises(InputError, match=r"the spacing of the slide is not known.*add its mpp to the manifest"):
        evaluated(".9,800,100\n", um_px=um_px)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            ".9,100,800\n.8,100,900\n",
            r"all 2 detections lie beyond the slide of 1200 x 600 px, the first at 100, 800; .*"
            r"\(they would lie on it with x and y exchanged\)",
        ),
        (".9,1300,100\n", "the one detection lies beyond the slide of 1200 x 600 px, at "),
        (".9,-5,100\n", "the one detection lies beyond the slide of 1200 x 600 px, at "),
        (
            "800,100,.9\n810,100,.8\n",
            r"2 of 2 confidences lie outside 0 to 1, the first is 800 \(column 3 holds numbers",
        ),
        ("1.5,800,100\n", "1 of 1 confidences lie outside 0 to 1, the first is 1.5"),
        ("-0.1,800,100\n.3,800,100\n", "1 of 2 confidences lie outside"),
        (".9,1,2\nnan,1,2\n.8,inf,2\n", r"line 2: 'nan' is not finite, and so in 2 of 3 lines \(2, 3\)"),
    ],
)
def test_what_is_refused(evaluated, text, message):
    """Detections off their slide, confidences that are none, and numbers that are none; file and slide are named."""
    with pytest.raises(InputError, match=message) as caught:
        evaluated(text)
    assert "slide a, evaluation" in str(caught.value)
    assert "a.csv" in str(caught.value)


def test_without_the_slide_its_mask_shows_the_size(evaluated):
    """A mask image is as large as its slide."""
    with pytest.raises(InputError, match=r"lies beyond the mask of 1216 x 608 px"):
        evaluated(".9,100,800\n", slides=False)


NONE = "of {n} detections on slides with lesions lie in one, and"


@pytest.mark.parametrize(
    ("text", "remark"),
    [
        (".9,150,500\n.8,800,100\n.7,99,700\n", "slide a: 1 of 3 detections lie beyond the slide"),
        (".9,800,100\n.8,800,100\n.8,9,9\n", "slide a: 1 detection repeats the place of another, first at 800, 100"),
        (".9,25,3\n.8,30,4\n.7,33,6\n", f"none {NONE.format(n=3)} 3 would in pixels of a map at 1/32"),
        (".9,50,6\n.8,60,8\n.7,66,12\n", f"none {NONE.format(n=3)} 3 would in pixels of a map at 1/16"),
        (".9,400,50\n.8,450,40\n", f"none {NONE.format(n=2)} 2 would in um"),
        (".9,100,560\n.8,120,590\n.7,9,9\n", f"none {NONE.format(n=3)} 2 would with x and y exchanged"),
        (".9,800,100\n.8,100,560\n.7,120,590\n.6,90,580\n", f"1 {NONE.format(n=4)} 3 would with x and y exchanged"),
        (".9,2,3\n.8,3,4\n", "all detections lie in the first 1/16 of their slides"),
    ],
)
def test_what_is_told(evaluated, text, remark):
    """Each doubt is a sentence; the scores are those of the file as it is."""
    (told,) = evaluated(text).remarks
    assert told.startswith(remark)


@pytest.mark.parametrize("text", ["", ".9,100,400\n", ".9,800,100\n.8,100,560\n.7,120,590\n"])
def test_what_needs_no_word(evaluated, text):
    """No detection, misses that would be misses in any unit, and hits with as many misses."""
    assert evaluated(text).remarks == ()


def test_why_a_score_is_not_defined(evaluated, tmp_path):
    """Only normal slides have neither FROC nor AUC, and ITC alone no FROC."""
    png(tmp_path / "a.png", painted((19, 38), []))
    remarks = evaluated(".9,800,100\n", label="normal").remarks
    assert remarks == (
        "froc.score is not defined: no slide has an annotated lesion",
        "roc.auc is not defined: there is no tumour slide",
    )
    png(tmp_path / "a.png", painted((19, 38), [LESION]))
    (itc,) = evaluated(".9,800,100\n", itc_um=9000).remarks
    assert (
        itc == "froc.score is not defined: no slide has an annotated lesion that is larger than isolated tumour cells"
    )


def test_the_command_tells_it(evaluated, tmp_path, capsys):
    """Remarks go to standard error; the number of normal slides stands beside FROC."""
    evaluated(".9,400,50\n.8,450,40\n")
    options = ["--manifest", tmp_path / "m.csv", "--detections", tmp_path / "d", "--out", tmp_path / "out"]
    more = ["--mask-downsample", "1", "--bootstrap", "0"]
    assert main(["evaluate", *map(str, options), *more]) == 0
    told = capsys.readouterr()
    assert "froc.n_normal 1.0" in told.out
    assert "note: none of 2 detections on slides with lesions lie in one, and 2 would in um" in told.err
    assert main(["evaluate", *map(str, options), *more, "--unit", "um", "--group", "Necrosis=ignore"]) == 0
    told = capsys.readouterr()
    assert "froc.strict_score 1.0" in told.out
    assert not told.err
    assert main(["evaluate", *map(str, options), *more, "--group", "Necrosis=maybe"]) == 20
    assert "groups.necrosis: Input should be 'tumour', 'normal', 'ignore' or 'other'" in capsys.readouterr().err
