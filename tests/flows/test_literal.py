"""Paths and texts on the command line mean themselves, whatever characters they have."""

import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from flows import run
from flows.compose import compose_config, trials
from flows.literal import literal
from wsiflow.errors import InputError
from wsiflow.slides.kinds import source_of

NAMES = [
    *("Fälle 2024", "a (1).svs", "a,b", "a=b", "100 %", "#2", "it's", 'say "x"', "back\\slash", "ends\\", "日本", "😀"),
    *("2024", "007", "1e5", "true", "null", "[a]", "{a: 1}", "(1)", "a{b", "'a b'x", "a&b;c!d*?", "$HOME", "a~b", "@x"),
    *(":x", "a: b", "choice(a)", "glob(x)"),
]


def meaning(override: str) -> object:
    """Return the value that a run gets from an override."""
    (text,) = literal([override])
    parsed = OverridesParser.create().parse_override(text)
    resolved: Any = OmegaConf.to_container(OmegaConf.create({"value": parsed.value()}), resolve=True)
    return resolved["value"]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_means_itself(name: str) -> None:
    """Whatever its name, in every place of a path."""
    for path in (name, f"/slides/{name}", f"{name}/x"):
        assert meaning(f"dataset.folder={path}") == path
        assert meaning(f"out={path}") == path


def test_a_run_has_the_paths_that_were_typed() -> None:
    """The folder of slides, that of the run and the card of the model are what was typed."""
    name = "Fälle (1), 100 % = #2 'x'"
    config = compose_config(["dataset=folder", f"dataset.folder=2024/{name}", f"out={name}", f"model.card={name}.json"])
    assert (source_of(config.dataset), config.out) == (Path("2024", name).absolute(), Path(name).absolute())
    assert config.model.card == Path(f"{name}.json").absolute()


@pytest.mark.parametrize("name", [*NAMES, "'quoted'", "a\\,b", " blanks ", "${name}", "x${name}\\"])
def test_a_file_of_exactly_that_name_comes_first(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quotes, escapes and interpolations are those of the name then."""
    monkeypatch.chdir(tmp_path)
    Path(name).touch()
    assert meaning(f"dataset.path={name}") == name
    once = literal([f"dataset.path={name}"])
    assert literal(once) == once


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(st.characters(exclude_categories=["C"], exclude_characters="/$'\"\\"), min_size=1, max_size=12))
def test_any_path_means_itself(name: str) -> None:
    """Without a file of that name, only quotes, escapes and interpolations are Hydra's."""
    assert str(meaning(f"dataset.path=/absent/{name}")).strip() == f"/absent/{name}".strip()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("'a b'", "a b"),
        ('"a, b"', "a, b"),
        ("a\\,b", "a,b"),
        ("${name}/x", "run/x"),
        ("ü/${name}", "ü/run"),
    ],
)
def test_what_is_a_text_for_hydra_stays_one(typed: str, meant: str) -> None:
    """Quotes, escapes and interpolations that users of Hydra write keep their meaning."""
    assert compose_config([f"out={typed}"]).out == Path(meant).absolute()


def test_null_and_texts_of_other_keys() -> None:
    """Keys that may be null can be; a text is quoted only where Hydra cannot read it, and no list."""
    assert compose_config(["share=null"]).share is None
    assert compose_config(["name=Fälle (1)"]).name == "Fälle (1)"
    assert compose_config(["tracking.uri=sqlite:////home/jörg/x.db"]).tracking.uri == "sqlite:////home/jörg/x.db"
    for override in ("name='a", "evaluation.exclude=[a", "name=a,b"):
        assert literal([override]) == [override]


def test_commas_separate_the_paths_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every path is literal; a comma is part of a path that exists."""
    monkeypatch.chdir(tmp_path)
    assert [one.swept for one in trials(["dataset=single", "dataset.path=/é/a.svs,/x/b (1).svs"]).values()] == [
        ["dataset.path='/é/a.svs'"],
        ["dataset.path='/x/b (1).svs'"],
    ]
    Path("a,b.svs").touch()
    Path("plain.svs").touch()
    plain = "dataset.path=plain.svs,/absent/b.svs"
    assert literal([plain], sweep=True) == [plain], "trials keep their names"
    assert len(trials(["dataset=single", "dataset.path=a,b.svs", "seed=1,2"])) == 2
    words = ["-m", "dataset=single", "dataset.path=a,c.svs", "--config-dir", "dataset.path=é", "seed=1,2"]
    assert run.as_typed(words) == words
    assert run.as_typed(words[1:])[1] == "dataset.path='a,c.svs'"


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave a tilde behind an equals sign as it is."""
    monkeypatch.setenv("HOME", str(tmp_path / "jörg"))
    config = compose_config(["dataset=folder", "dataset.folder=~/slides", "out=~/runs/a"])
    assert (source_of(config.dataset), config.out) == (tmp_path / "jörg/slides", tmp_path / "jörg/runs/a")


@pytest.mark.parametrize(
    ("path", "cause"), [("C:\\slides", "a path of Windows"), ("https://x.org/a.svs", "is an address")]
)
def test_what_is_no_path_of_this_machine_is_told(path: str, cause: str) -> None:
    """As in a manifest."""
    with pytest.raises(InputError, match=cause):
        compose_config(["dataset=single", f"dataset.path={path}"])


def test_overrides_of_the_command_line_are_found_among_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of Hydra's options are none."""
    monkeypatch.setattr(sys, "argv", ["wsiflow run", "a=1", "--config-dir", "b=2", "-m", "c=3"])
    assert run._typed_overrides() == ["a=1", "c=3"]
