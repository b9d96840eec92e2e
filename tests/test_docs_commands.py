"""Every command of the documents is run as it is typed, over two tiny slides, or is named here with what runs it else.

The absolute folders of the documents lie in a sandbox. Settings that make a run small are added where the line leaves
them open, and of each axis of a sweep the first two values are taken: what a user reads is parsed, composed, planned,
computed and written. Lines of one page are run in their order, since one needs what another wrote.
"""

import io
import re
import shlex
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows import cli
from wsiflow.analysis.viewer import server
from wsiflow.slides import pyramid

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "wsiflow/model/weights"
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "training/README.md",
    "benchmarks/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md")),
)
PROGRAMS = re.compile(
    r"(wsiflow|make|pip|python3?|prefect|docker|apptainer|ssh|open|sbatch|curl|export|sudo|chmod|set|sed|source) |id="
)

ELSEWHERE = {
    "make demo": "the first command of the tests of releases, and the slides of `tests/test_experiments.py`",
    "make test": "this is it",
    "make pictures": "the tests in a browser, with the pictures kept",
    "make setup": "what made the environment of the tests",
    "make check": "a step of its own beside the tests",
    "make site": "`tests/test_site.py`",
    "make release": "needs every Python; releases are made by it",
    "make bench": "takes an hour",
    "make prefect": "`tests/serving.py` starts the same server, on a port of its own",
    "prefect": "`tests/flows/test_deployments.py`, with a server and a worker of its own",
    "curl": "`tests/flows/test_deployments.py` asks the same of a server of its own",
    "id=": "`tests/flows/test_deployments.py` asks the same of a server of its own",
    "sed": "`tests/flows/test_deployments.py` fills the same file in",
    "export": "names a server, a home or a password of the reader's",
    "source": "enters the environment that the tests have",
    "set -a": "reads passwords of the reader's",
    "chmod": "a file with passwords of the reader's",
    "sudo": "a database server",
    "pip install": "what made the environment of the tests; extras are in `tests/install_zoo.sh`",
    "python3 -m venv": "what made the environment of the tests",
    "python -m benchmarks": "`tests/test_benchmarks.py`, in small sizes",
    "python training": "hours of training",
    "docker": "needs a Docker daemon",
    "apptainer": "needs Apptainer",
    "ssh": "needs a second machine",
    "open": "starts the reader's browser; `tests/flows/test_view.py` opens the report in one",
    "sbatch": "`tests/run/test_arrays.py` runs drivers as jobs of a real Slurm",
    "wsiflow doctor executor=slurm_array --cluster": "`tests/run/test_arrays.py`, on a real scheduler",
    "wsiflow plan executor=slurm_array": "`tests/run/test_arrays.py`, on a real Slurm: it measures on the nodes",
    "wsiflow plan dataset=folder dataset.folder=/data/slides out=runs/first executor=slurm_array": "likewise",
    "wsiflow cancel": "`tests/run/test_arrays.py`, of jobs of a real Slurm",
    "wsiflow retry /shared": "`tests/run/test_arrays.py`, of jobs of a real Slurm",
    "wsiflow forest": "`tests/evaluation/test_slide_score.py`; it needs more slides than a test of a page can run",
    "wsiflow model add": "`tests/model/test_add.py` and `test_zoo.py`, where timm is installed",
    "wsiflow run model=card model.card=models/tissue.json": "`tests/run/test_maps.py`, with a network of three classes",
    "wsiflow compare wsiflow --sweep strides --reference": "`tests/analysis/test_tradeoff.py`: it has two axes",
    "wsiflow compare wsiflow --sweep like_camelyon16": "`tests/analysis/test_tradeoff.py`: it has three",
    "wsiflow synth": "`tests/slides/test_synthetic_camelyon16.py`; it needs CAMELYON16's tables",
    "wsiflow run --config-dir reviewers": "`tests/analysis/test_reviewers.py` repeats a run from its export",
    "wsiflow compare-maps runs/first runs/again": "`tests/analysis/test_reviewers.py`, of the repeated run",
    "wsiflow run -m experiment=search": "`tests/flows/test_sweep.py`, where Optuna is installed",
    "wsiflow compare wsiflow --tag": "`tests/analysis/test_tradeoff.py`: the reader gives the tags",
}
"""Commands by how they begin, and what runs them, or why nothing can."""

SMALL = {
    "dataset": "manifest",
    "dataset.manifest": "cases.csv",
    "inference.stride": "112",
    "dense.windows": "8",
    "executor": "inline",
    "orchestrator": "none",
    "tracking": "off",
    "evaluation.bootstrap": "20",
    "evaluation.itc_um": "0",
}
FEW = {"inference.precision": "fp32", "stain": "none"}  # of an experiment's own axes
FOLDERS = re.compile(r"(?<![\w.}>])/(data|shared|models|scratch|home)\b")


def commands(page: str) -> list[str]:
    """Return the lines of a page that are commands, without what is said of them."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    lines = (line.split("  #")[0].strip() for line in text.splitlines() if line.startswith("    "))
    return [line for line in lines if PROGRAMS.match(line)]


def elsewhere(line: str) -> list[str]:
    """Return how the commands begin that are not run here, of which this line is one."""
    return [start for start in ELSEWHERE if line.startswith(start)]


def small(words: list[str]) -> list[str]:
    """Return the words of ``wsiflow run`` or ``plan`` with the settings that make it small and are left open."""
    words = _few_trials(words) if "-m" in words else words
    typed = {word.split("=")[0] for word in words}
    is_free = any(word.startswith("out=") and not Path(word[4:]).exists() for word in words)
    if "-m" not in words and not is_free:
        words = [*(word for word in words if not word.startswith("out=")), f"out=made/{len([*Path('made').glob('*')])}"]
    more = {key: value for key, value in SMALL.items() if key not in typed}
    if typed & {"dataset", "dataset.path"}:
        more.pop("dataset.manifest", None)
    if "-m" in words and any(word.startswith("experiment=") for word in words):
        more |= {key: value for key, value in FEW.items() if key not in typed}
    if "executor=ours" in words or any("_array" in word for word in words):
        more.pop("executor", None)
    if "name=strides" in words and not Path("mlflow.db").exists():  # what pages compare from MLflow
        more.pop("tracking")
    script = ["--script-only"] if words[0] == "run" and {"executor=slurm_array", "executor=ours"} & {*words} else []
    return [words[0], *([] if "--script-only" in words else script), *words[1:], *(f"{k}={v}" for k, v in more.items())]


def _few_trials(words: list[str]) -> list[str]:
    """Return a sweep with two values of its first axis, and one of each other."""
    axes = [word for word in words if "," in word and "[" not in word]
    few = [",".join(word.split(",")[: 2 if word in axes[:1] else 1]) if word in axes else word for word in words]
    is_given = any(word.startswith("inference.stride=") for word in words)
    return few if is_given else [*few, f"inference.stride={'112' if axes else '112,224'}"]


def run(line: str, box: Path) -> int:
    """Run a command of ``wsiflow`` in the folder of the sandbox, and return its exit code."""
    here = FOLDERS.sub(lambda match: f"{box}{match[0]}", line.replace("~", f"{box}/home"))
    line, _, target = here.partition(" > ")
    words = shlex.split(line)[1:]
    if words[0] in {"run", "plan"} and not {"--help", "--cfg"} & {*words}:
        words = small(words)
    out = io.StringIO()
    with redirect_stdout(out):
        try:
            code = cli.main(words)
        except SystemExit as ended:  # a help
            code = int(ended.code or 0)
    if target:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(out.getvalue())
    return code


# --- the sandbox


def _write_slide(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.normal(240, 2, (500, 600, 3))
    pixels[150:350, 150:450] = rng.normal((190, 120, 180), 12, (200, 300, 3))
    image = np.clip(pixels, 0, 255).astype(np.uint8)
    pyramid.write_rgb(path, iter([image]), shape=(500, 600), um_px=0.243, quality=90)


def _write_slides(folder: Path, seed: int) -> None:
    """Write two slides, one with an outline, and their manifest."""
    folder.mkdir(parents=True)
    corners = "".join(
        f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in enumerate([(160, 160), (400, 160), (400, 340)])
    )
    outline = f'<Annotation Name="t" PartOfGroup="tumor"><Coordinates>{corners}</Coordinates></Annotation>'
    (folder / "tumor_001.xml").write_text(f"<ASAP_Annotations><Annotations>{outline}</Annotations></ASAP_Annotations>")
    lines = ["slide_id,path,label,annotation_path,scanner,tissue_mask_path"]
    for name, label, outlines in (("tumor_001", "tumor", folder / "tumor_001.xml"), ("normal_001", "normal", "")):
        _write_slide(folder / f"{name}.tif", seed := seed + 1)
        Image.fromarray(np.full((50, 60), 255, np.uint8)).save(folder / f"{name}_tissue.png")
        lines.append(f"{name},{folder}/{name}.tif,{label},{outlines},a,{folder}/{name}_tissue.png")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with all that the documents suppose to be there."""
    folder = tmp_path_factory.mktemp("box")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setattr(server.Viewer, "serve_forever", lambda _self: None)
        _fill(folder)
        yield folder


def _fill(folder: Path) -> None:
    _write_slides(folder / "data/slides", 1)
    _write_slides(folder / "other", 5)
    for name in ("slides", "train_cases", "test_cases", "cases"):
        shutil.copy(folder / "data/slides/manifest.csv", folder / f"{name}.csv")
    for name in ("shared/slides", "slides", "runs/like/slides"):
        shutil.copytree(folder / "data/slides", folder / name, ignore=shutil.ignore_patterns("*.png"))
    for name in ("a.svs", "slide.svs", "data/a.svs"):
        shutil.copy(folder / "data/slides/tumor_001.tif", folder / name)
    (folder / "centres.csv").write_text("slide_id,centre\ntumor_001,a\nnormal_001,b\n")
    (folder / "scores.csv").write_text("slide_id,score\ntumor_001,0.9\nnormal_001,0.1\n")
    _write_settings("docs/cluster.md", folder / "site/executor/ours.yaml", "    defaults: [slurm_array")
    _write_settings("docs/sweeps.md", folder / "lab/experiment/tuned.yaml", "    # @package _global_")
    shutil.copytree(folder / "site/executor", folder / "lab/executor")
    _write_models(folder)
    _write_runs(folder)


def _write_models(folder: Path) -> None:
    """Write the cards that pages name, and labelled patches."""
    for name in ("models/mine", "models/resnet18", "first", "second"):
        path = folder / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        shutil.copy(WEIGHTS / "pcam.json", path)
        shutil.copy(WEIGHTS / "pcam.safetensors", path.parent)
    for kind in ("normal", "tumor"):
        (folder / "patches" / kind).mkdir(parents=True)
        Image.fromarray(np.full((96, 96, 3), 200, np.uint8)).save(folder / f"patches/{kind}/a.png")


def _write_runs(folder: Path) -> None:
    """Write the finished runs that pages name, and what they take from one."""
    for name, stride in {"first": 112, "b": 56, "fine": 8}.items():
        settings = SMALL | {"inference.stride": stride, "out": f"runs/{name}"}
        assert cli.main(["run", *(f"{key}={value}" for key, value in settings.items())]) == 0
    for name in ("fp32", "bf16", "s16", "s32", "a", "train", "test", "../shared/runs/first"):
        shutil.copytree(folder / "runs/first", folder / "runs" / name)
    shutil.copytree(folder / "runs/b", folder / "runs/s112")
    for name in ("detections", "found"):
        shutil.copytree(folder / "runs/first/detections", folder / name)
    (folder / "masks").mkdir()
    for path in folder.glob("runs/first/tissue/*.png"):
        shutil.copy(path, folder / "masks")


def _write_settings(page: str, path: Path, begin: str) -> None:
    """Write a file of settings as a page has it, from a line on."""
    text = (ROOT / page).read_text()
    block = text[text.index(begin) :].split("\n\n")[0]
    path.parent.mkdir(parents=True)
    path.write_text(textwrap.dedent(FOLDERS.sub(lambda match: f"{path.parents[2]}{match[0]}", block)) + "\n")


@pytest.mark.parametrize("page", [page for page in PAGES if any(not elsewhere(line) for line in commands(page))])
def test_every_command_of_a_page_runs(page: str, box: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It ends as it should; what the machine lacks for a cluster is told by `doctor`, and is no fault of the page."""
    failed = []
    for line in commands(page):
        if not elsewhere(line):
            code = run(line, box)
            if code != 0 and (code, "doctor") != (30, shlex.split(line)[1]):
                failed.append(f"{line}: {code}, {capfd.readouterr().err}")
    assert failed == []


def test_what_is_not_run_here_is_named() -> None:
    """Each reason is that of a command of the documents, and there is one reason for each."""
    lines = [line for page in PAGES for line in commands(page)]
    assert [start for start in ELSEWHERE if not any(start in elsewhere(line) for line in lines)] == []
    assert [line for line in lines if not line.startswith("wsiflow ") and not elsewhere(line)] == []
