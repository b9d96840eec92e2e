"""What the documents tell users to type is accepted, and what is said of settings is complete."""

import importlib.util
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from swept import jobs_of

from flows import cli
from flows.compose import compose_config
from wsiflow.plan.geometry import Frame, l0_from_h, l0_from_h_corner, window_offsets_px
from wsiflow.run import config

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/cascade.md",
    "docs/cluster.md",
    "docs/compare.md",
    "docs/deploy.md",
    "docs/mlflow.md",
    "docs/scaling.md",
    "docs/sweeps.md",
    "docs/tissue.md",
    "docs/tradeoff.md",
    "docs/tradeoff-data.md",
    "docs/truth.md",
)
# What composes only beside a folder of the user's own, or is wrong on purpose.
ELSEWHERE = ("--config-dir", "--wrap", "inference.strid=")
OVERRIDE = re.compile(r"\+?[a-z_]+(\.[a-z_]+)*=\S+|\+?[a-z_]+(\.[a-z_]+)+=\S+")


def overrides() -> list[tuple[str, ...]]:
    """Return the overrides of each ``wsiflow run`` and ``wsiflow plan`` line, and those that stand alone."""
    found = set()
    for name in PAGES:
        for line in (ROOT / name).read_text().replace("\\\n", " ").splitlines():
            code = line.split("  #")[0].strip()
            if any(word in code for word in ELSEWHERE):
                continue
            if code.startswith(("wsiflow run", "wsiflow plan", "docker run", "apptainer exec")):
                words = [word for word in shlex.split(code) if OVERRIDE.fullmatch(word) and " -m " not in code]
                found.add(tuple(words))
            elif re.match(r"executor\.[a-z_.]+=", code):
                found.add((_executor(code), code))
            found.update((_executor(part), part) for part in re.findall(r"`(\+?executor\.[a-z_.]+=[^`\s]+)`", code))
    return sorted(found - {()})


def _executor(override: str) -> str:
    return "executor=dask" if "executor.dask" in override else "executor=slurm_array"


@pytest.mark.parametrize("words", overrides(), ids=" ".join)
def test_every_override_in_the_documents_is_accepted(words: tuple[str, ...]) -> None:
    """Lines can be typed as they stand."""
    assert compose_config(words).name


def test_the_documents_have_overrides() -> None:
    """The search above finds what it is for."""
    assert len(overrides()) > 8
    assert any("executor=slurm_array" in words and len(words) > 3 for words in overrides())


COMMANDS = ("compare", "compare-maps", "export", "view")


def commands() -> list[str]:
    """Return the lines of the documents that call a command on files."""
    texts = (path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
    whole = (text.replace("\\\n", " ") for text in texts)
    lines = (line.split("  #")[0].strip() for text in whole for line in text.splitlines() if line.startswith("    "))
    return sorted({line for line in lines if line.startswith(tuple(f"wsiflow {name} " for name in COMMANDS))})


@pytest.mark.parametrize("line", commands())
def test_every_command_in_the_documents_is_understood(line: str) -> None:
    """Its options exist; whether its files do is another matter."""
    assert cli.read(shlex.split(line)[1:])


def test_the_documents_have_commands() -> None:
    assert len(commands()) > 4


def sweeps() -> list[tuple[str, ...]]:
    """Return the overrides of each ``wsiflow run -m`` line, and a bare line for every experiment but the search."""
    pages = ((ROOT / name).read_text().replace("\\\n", " ") for name in PAGES)
    lines = [line.split("  #")[0].strip() for page in pages for line in page.splitlines()]
    headers = (path.read_text().replace("\\\n#", " ") for path in ROOT.glob("conf/experiment/*.yaml"))
    lines += [header.split("wsiflow run -m ")[1].split("\n")[0] for header in headers]
    typed = [line for line in lines if line.startswith(("wsiflow run -m", "experiment=")) and "=search" not in line]
    return sorted({tuple(word for word in line.split() if "=" in word) for line in typed})


def once(words: tuple[str, ...]) -> tuple[str, ...]:
    """Return a sweep without its repeats, which multiply the trials and change none of them."""
    return tuple(word for word in words if not word.startswith("repeat="))


@pytest.mark.parametrize("words", sorted({once(words) for words in sweeps()}), ids=" ".join)
def test_every_trial_of_the_sweeps_in_the_documents_is_accepted(words: tuple[str, ...]) -> None:
    """Each combination composes, has a folder of its own, and shares with all others."""
    trials = {job: compose_config(asked, job=job) for job, asked in jobs_of(words).items()}
    assert len(trials) > 1
    assert len({config.out for config in trials.values()}) == len(trials)
    assert len({config.share for config in trials.values()}) == 1


@pytest.mark.parametrize("words", [words for words in sweeps() if once(words) != words], ids=" ".join)
def test_the_repeats_in_the_documents_are_accepted(words: tuple[str, ...]) -> None:
    """The repeats of a combination have folders of their own and share nothing; they multiply the combinations."""
    jobs, (axis,) = jobs_of(words), [word for word in words if word.startswith("repeat=")]
    assert len(jobs) == len(jobs_of(once(words))) * len(axis.split(","))
    first = {job.rsplit("repeat=")[-1]: (job, asked) for job, asked in reversed(jobs.items())}
    trials = [compose_config(asked, job=job) for job, asked in first.values()]
    assert sorted(config.repeat for config in trials) == sorted(map(int, axis.removeprefix("repeat=").split(",")))
    assert len({config.out for config in trials}) == len({config.share for config in trials}) == len(trials)


def test_other_keys_are_further_axes_of_an_experiment() -> None:
    """Every axis that one may want goes with an experiment, and its own may be narrowed."""
    axes = ["inference.engine=dense,window", "inference.precision=fp32,bf16,int8", "inference.stride=16,56"]
    axes += ["stain=none,macenko", "geometry.spacing=model,native", "store.compression=none,jpeg"]
    axes += ["tiles.group_tiles=100,400", "repeat=1,2,3"]
    jobs = jobs_of(["experiment=stride_tradeoff", *axes])
    assert len(jobs) == 2 * 3 * 2 * 2 * 2 * 2 * 2 * 3
    job, asked = list(jobs.items())[-1]
    last = compose_config(asked, job=job)
    assert (last.inference.precision, last.stain.method, last.store.compression) == ("int8", "macenko", "jpeg")
    assert (last.inference.stride, last.geometry.spacing, last.repeat, last.name) == (
        56,
        "native",
        3,
        "stride_tradeoff",
    )


def test_the_page_of_settings_has_every_key_with_its_values() -> None:
    """It is made of ``conf/`` and of the forms when the site is built."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs/hooks/pages.py")
    assert spec is not None
    assert spec.loader is not None
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    text = pages.settings_page()
    assert [key for key in config.known_keys() if f"**`{key}`**" not in text] == []
    assert "- **`lesions.threshold`** = `0.5`" in text
    assert "- **`executor.threads`** = `1`" in text
    link = "[a](docs/truth.md#b), [c](training/README.md), [d](LICENSE), [e](https://e.org)"
    assert pages._with_links(link, Path()) == "[a](truth.md#b), [c](training.md), d (`LICENSE`), [e](https://e.org)"


def test_the_formula_of_the_page_on_heatmaps_is_that_of_the_code() -> None:
    """Its example: cell (10, 20) of a map of stride 16 over level 0."""
    page = (ROOT / "docs/heatmap.md").read_text()
    frame = Frame("centred", 9000, 9000, 1.0, 0.243, 224, 224, 16, 112, 1, 1, 0, 0, 40, 40)
    x, y = l0_from_h_corner(frame, 10, 20)
    (centre,) = l0_from_h(frame, np.array([[10.0, 20.0]]))
    left, top = centre - 112
    assert (left - x, top - y) == tuple(window_offsets_px(frame)[0])
    cell = f"covers x {x:.0f} to {x + 16:.0f} and y {y:.0f} to {y + 16:.0f}"
    assert f"{cell}, and its window x {left:.0f} to {left + 224:.0f} and y {top:.0f} to {top + 224:.0f}" in page
