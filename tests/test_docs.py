"""What the documents tell users to type is accepted."""

import re
import shlex
from pathlib import Path

import pytest

from flows.run import compose_config
from wsiflow import cli

ROOT = Path(__file__).parents[1]
OVERRIDE = re.compile(r"\+?[a-z_]+(\.[a-z_]+)*=\S+|\+?[a-z_]+(\.[a-z_]+)+=\S+")


def overrides() -> list[tuple[str, ...]]:
    """Return the overrides of each ``wsiflow run`` and ``wsiflow plan`` line, and those that stand alone."""
    found = set()
    for name in ("README.md", "docs/deploy.md", "docs/scaling.md"):
        for line in (ROOT / name).read_text().splitlines():
            code = line.split("  #")[0].strip()
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


COMMANDS = ("compare-maps", "export")


def commands() -> list[str]:
    """Return the lines of the documents that call a command on files."""
    texts = (path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
    lines = (line.split("  #")[0].strip() for text in texts for line in text.splitlines() if line.startswith("    "))
    return sorted({line for line in lines if line.startswith(tuple(f"wsiflow {name} " for name in COMMANDS))})


@pytest.mark.parametrize("line", commands())
def test_every_command_in_the_documents_is_understood(line: str) -> None:
    """Its options exist; whether its files do is another matter."""
    assert cli._parser().parse_args(shlex.split(line)[1:]).command


def test_the_documents_have_commands() -> None:
    assert len(commands()) > 4
