"""Configuration: every YAML composes and validates; nothing unknown or out of bounds gets past the start."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.run import compose_config
from wsiflow.config import RunConfig, validate
from wsiflow.errors import InputError

CONF = Path(__file__).parents[1] / "conf"
OPTIONS = sorted(f"{path.parent.name}={path.stem}" for path in CONF.rglob("*/*.yaml"))
# What a group's option leaves for the user to say.
GIVEN = {
    "dataset=manifest": ["dataset.manifest=m.csv"],
    "dataset=folder": ["dataset.folder=slides"],
    "dataset=single": ["dataset.path=a.svs"],
    "dataset=synthetic": ["dataset.folder=synthetic"],
    "model=googlenet": ["model.card=g.json"],
    "model=card": ["model.card=g.json"],
    "experiment=like_camelyon16": ["dataset.manifest=m.csv"],
    "geometry=reference": ["tiles=patch"],
}


def composed(*overrides: str) -> RunConfig:
    return compose_config(overrides)


def test_every_option_is_found() -> None:
    """The walk sees the groups of the design."""
    groups = {option.split("=")[0] for option in OPTIONS}
    assert groups >= {
        "dataset",
        "model",
        "geometry",
        "tissue",
        "tiles",
        "inference",
        "stain",
        "store",
        "executor",
        "tracking",
    }


@pytest.mark.parametrize("option", OPTIONS)
def test_every_yaml_composes_and_validates(option: str) -> None:
    """Each file of each group makes a valid configuration with what it asks for."""
    assert isinstance(composed(option, *GIVEN.get(option, [])), RunConfig)


def test_defaults_compose() -> None:
    """No argument at all is the demo."""
    assert composed().dataset.kind == "synthetic"


def test_every_path_begins_at_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers may be in other folders: what is published of a configuration means the same everywhere."""
    monkeypatch.chdir(tmp_path)
    given = ["out=o", "share=s", "model=card", "model.card=c.json", "tracking.uri=sqlite:///x/../t.db"]
    given += [f"dataset.{name}=d/{name}" for name in ("manifest", "folder", "path", "data")]
    config = composed(*given)
    told = config.model_dump_json()
    found = [config.out, config.share, config.model.card, *config.dataset.model_dump().values()]
    paths = [path.relative_to(tmp_path).as_posix() for path in found if isinstance(path, Path)]
    assert paths == ["o", "s", "c.json", "d/manifest", "d/folder", "d/path", "d/data"]
    assert config.tracking.uri == f"sqlite:///{tmp_path}/t.db"
    monkeypatch.chdir("/")
    assert RunConfig.model_validate_json(told) == config
    assert {name for name, node in _nodes(RunConfig.model_json_schema()) if node.get("format") == "path"} == {
        *("out", "share", "card", "manifest", "folder", "path", "data")
    }, "a new path is added to this test"


def _nodes(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every value of a configuration by its name, with each of the schemas it may have."""
    for part in (schema, *schema["$defs"].values()):
        for name, node in part.get("properties", {}).items():
            yield from ((name, each) for each in (node, *node.get("anyOf", [])))


def test_packaged_cards_are_found_anywhere() -> None:
    """Their path is a name."""
    assert str(composed("model=pcam").model.card) == "pkg:pcam.json"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("inference.stride=30", "inference.stride"),
        ("inference.stride=0", "inference.stride"),
        ("inference.precision=fp8", "inference.precision"),
        ("inference.engine=psychic", "inference.engine"),
        ("tissue.min_coverage=1.5", "tissue.min_coverage"),
        ("seed=-1", "seed"),
        ("executor.threads=0", "executor.threads"),
        ("orchestrator=airflow", "orchestrator"),
        ("+tiles.colour=red", "tiles.colour"),
        ("+nonsense=1", "nonsense"),
        ("tiles.halo_px=wide", "tiles.halo_px"),
        ("tiles.block_cols=0", "tiles.block_cols"),
        ("dense.tolerance=0", "dense.tolerance"),
        ("dense.halo=most", "dense.halo"),
        ("store.compression=zip", "store.compression"),
        ("out=", "out"),
        ("evaluation.l0_um_px=inf", "evaluation.l0_um_px"),
    ],
)
def test_bad_values_are_refused_by_name(override: str, named: str) -> None:
    """The message names the dotted key."""
    with pytest.raises(InputError, match=named.replace(".", r"\.")):
        composed(override)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("tiles.tile_px=112", "tiles.tile_px"),
        ("geometry.spacing=model", "geometry.spacing"),
        ("tiles.block_cols=4", "tiles.block_cols"),
        ("tiles=strip", r"tiles\.halo_px"),
    ],
)
def test_reference_geometry_has_one_meaning(override: str, named: str) -> None:
    """Its index is of 224 px tiles at level 0; anything else would read other places than it names."""
    with pytest.raises(InputError, match=f"{named} is .*, geometry=reference needs"):
        composed("geometry=reference", "tiles=patch", override)


@pytest.mark.parametrize(("given", "meant"), [("model", "model"), ("native", "native"), ("0.5", 0.5), ("2", 2.0)])
def test_spacing_is_a_word_or_a_number(given: str, meant: object) -> None:
    """So that it can be swept."""
    assert composed(f"geometry.spacing={given}").geometry.spacing == meant


@pytest.mark.parametrize("given", ["0", "-1", "inf", "somewhere"])
def test_a_spacing_that_is_none_is_refused(given: str) -> None:
    """By name."""
    with pytest.raises(InputError, match=r"geometry\.spacing"):
        composed(f"geometry.spacing={given}")


def test_an_experiment_that_is_none_is_refused() -> None:
    """It would run something else, and say nothing."""
    with pytest.raises(InputError, match=r"Could not find 'experiment/nothing'.*stride_tradeoff"):
        composed("experiment=nothing")


def test_what_must_be_given_is_asked_for() -> None:
    """A data set that needs a path says which key."""
    with pytest.raises(InputError, match=r"no value for dataset\.manifest"):
        composed("dataset=manifest")


def test_all_problems_are_told_together() -> None:
    """Two bad values give one message with both keys."""
    with pytest.raises(InputError, match=r"(?s)seed.*tissue\.min_coverage|tissue\.min_coverage.*seed"):
        composed("seed=-1", "tissue.min_coverage=2")


def test_a_configuration_survives_being_written() -> None:
    """What is published as config.yaml validates to the same value."""
    config = composed()
    assert validate(config.model_dump(mode="json")) == config
