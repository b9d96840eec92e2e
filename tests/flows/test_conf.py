"""Configuration: every YAML composes and validates; nothing unknown or out of bounds gets past the start."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.__main__ import main
from flows.compose import compose_config
from flows.folders import default_name
from wsiflow.errors import InputError
from wsiflow.run import tracking
from wsiflow.run.cases import read_cases
from wsiflow.run.config import RunConfig, descriptions, known_keys, validate
from wsiflow.run.stages.choose import choice_key
from wsiflow.slides.kinds import FLAT, SyntheticSlides

CONF = Path(__file__).parents[2] / "conf"
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


# What Slurm needs nothing of, and other schedulers do.
OTHER_DIALECTS = ("environment", "unmet", "verify", "of_queue", "peak", "elapsed")


def composed(*overrides: str) -> RunConfig:
    return compose_config(overrides)


def test_every_option_is_found() -> None:
    """The search for files of ``conf/`` finds every group."""
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
    """Each file of each group gives a valid configuration, together with the values that it requires."""
    assert isinstance(composed(option, *GIVEN.get(option, [])), RunConfig)


def test_defaults_compose() -> None:
    """Without any argument the configuration is that of the demo."""
    assert composed().dataset.kind == "synthetic"


def test_every_path_begins_at_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths of a configuration are absolute, so that they mean the same in the folders of workers."""
    monkeypatch.chdir(tmp_path)
    common = ["out=o", "share=s", "model=card", "model.card=c.json", "tracking.uri=sqlite:///x/../t.db"]
    common += ["lesions.second=l", "lesions.gate=0.5", "lesions.slide_scores=l.csv"]
    common += [
        "inference.cascade.threshold=auto",
        "inference.cascade.model=k.json",
        "inference.cascade.development=v.csv",
    ]
    slides = {"manifest": ["manifest"], "folder": ["folder"], "single": ["path"], "synthetic": ["folder", "data"]}
    configs = [
        composed(*common, f"dataset={kind}", *(f"dataset.{name}=d/{name}" for name in names))
        for kind, names in slides.items()
    ]
    config, published = configs[0], configs[0].model_dump_json()
    settings = [config.out, config.share, config.model.card, config.lesions.second, config.lesions.slide_scores]
    settings += [config.inference.cascade.model, config.inference.cascade.development]
    settings += [one for each in configs for _, one in each.dataset]
    paths = [path.relative_to(tmp_path).as_posix() for path in settings if isinstance(path, Path)]
    slides_given = ["d/manifest", "d/folder", "d/path", "d/folder", "d/data"]
    assert paths == ["o", "s", "c.json", "l", "l.csv", "k.json", "v.csv", *slides_given]
    assert config.tracking.uri == f"sqlite:///{tmp_path}/t.db"
    dask = composed("out=o", "executor=dask_slurm").executor.dask
    assert dask is not None
    assert dask.cluster_kwargs["log_directory"] == f"{tmp_path}/o/logs/dask"
    assert dask.cluster_kwargs["shared_temp_directory"] == f"{tmp_path}/o/.attempts"
    monkeypatch.chdir("/")
    assert RunConfig.model_validate_json(published) == config
    assert {name for name, node in _nodes(RunConfig.model_json_schema()) if node.get("format") == "path"} == {
        *("out", "share", "card", "manifest", "folder", "path", "data", "second", "slide_scores", "calibration"),
        *("model", "development"),
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
    """Other values are refused: its index counts 224 px tiles at level 0, and would name other places."""
    with pytest.raises(InputError, match=f"{named} is .*, geometry=reference needs"):
        composed("geometry=reference", "tiles=patch", override)


@pytest.mark.parametrize(("typed", "expected"), [("model", "model"), ("native", "native"), ("0.5", 0.5), ("2", 2.0)])
def test_spacing_is_a_word_or_a_number(typed: str, expected: object) -> None:
    """A sweep can therefore mix words and numbers."""
    assert composed(f"geometry.spacing={typed}").geometry.spacing == expected


@pytest.mark.parametrize("typed", ["0", "-1", "inf", "somewhere"])
def test_a_spacing_that_is_none_is_refused(typed: str) -> None:
    """The message names the key."""
    with pytest.raises(InputError, match=r"geometry\.spacing"):
        composed(f"geometry.spacing={typed}")


def test_an_experiment_that_is_none_is_refused() -> None:
    """An unknown experiment is refused instead of running another one silently."""
    with pytest.raises(InputError, match=r"Could not find 'experiment/nothing'.*stride_tradeoff"):
        composed("experiment=nothing")


def test_what_must_be_given_is_asked_for() -> None:
    """The message names the key of the path that a data set needs."""
    with pytest.raises(InputError, match=r"no value for dataset\.manifest"):
        composed("dataset=manifest")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.manifest=mine"], "manifest is given, but the slides are synthetic; add dataset=manifest"),
        (["+dataset.manifest=mine"], "manifest is given, but the slides are synthetic: add dataset=manifest"),
        (["dataset.path=mine"], "path is given, but the slides are synthetic; add dataset=single"),
        (["dataset=single", "dataset.path=a", "dataset.size_px=9000"], "slides are a single one; add dataset=synth"),
        (["dataset=manifest", "dataset.folder=b"], "a manifest; add dataset=folder or dataset=synthetic"),
    ],
)
def test_what_is_said_of_other_slides_is_refused(overrides: list[str], message: str) -> None:
    """A path without its kind of data set is refused: the run would score the synthetic slides of the default."""
    with pytest.raises(InputError, match=rf"dataset\..*{message}"):
        composed(*overrides)


def test_every_key_is_described() -> None:
    """Every description is a whole sentence, since forms and the help show it."""
    assert [key for key, about in descriptions().items() if not re.fullmatch(r"[A-Z].*\.", about)] == []


def test_the_help_shows_every_key_of_what_is_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    """Each key is shown with its value, even one that refers to another key, and with its description."""
    assert main(["run", "--help", "executor=slurm_array"]) == 0
    output = capsys.readouterr().out
    of_others = {f"executor.array.dialect.{name}" for name in OTHER_DIALECTS}
    shown = {line.partition("=")[0] for line in output.splitlines() if re.match(r"[a-z_.0-9]+=", line)}
    assert shown == {
        key for key in known_keys() if not key.startswith(("executor.dask", "stain.target", "dataset."))
    } - of_others | {f"dataset.{name}" for name in SyntheticSlides.model_fields}
    assert "\ninference.stride=16\n    Distance between" in output
    assert "\ntracking.uri=${wsiflow_store:}\n    Address of" in output


def test_the_store_is_the_users_else_one_for_all_runs_of_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An override comes first, then MLflow's own variable; the default does not depend on the folder of the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    given = ["out=elsewhere/run"]
    assert compose_config(given).tracking.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://lab:5000")
    assert compose_config(given).tracking.uri == tracking.default_uri() == "http://lab:5000"
    assert compose_config([*given, "tracking.uri=sqlite:///own.db"]).tracking.uri == f"sqlite:///{tmp_path}/own.db"


def test_all_problems_are_told_together() -> None:
    """Two bad values give one message with both keys."""
    with pytest.raises(InputError, match=r"(?s)seed.*tissue\.min_coverage|tissue\.min_coverage.*seed"):
        composed("seed=-1", "tissue.min_coverage=2")


def test_a_configuration_survives_being_written() -> None:
    """The values that are published as config.yaml validate to the same configuration."""
    for config in (composed(), composed("dense.local=true")):
        assert validate(config.model_dump(mode="json")) == config


def test_a_key_that_earlier_versions_did_not_have_is_written_where_it_is_used() -> None:
    """So files of other runs, and the key of their choice, stay as they were."""
    plain, local = composed(), composed("dense.local=true")
    assert "local" not in plain.model_dump(mode="json")["dense"]
    assert "trust_python" not in plain.model_dump(mode="json")["model"]
    assert local.model_dump(mode="json")["dense"]["local"]
    assert choice_key(plain) != choice_key(local)


@pytest.mark.parametrize(("former", "now"), [("stop", "fail"), ("tell", "report")])
def test_a_folder_of_an_earlier_version_is_read(former: str, now: str, tmp_path: Path) -> None:
    """Earlier versions wrote settings of every kind of slides, and had another name for one key."""
    config = composed("dataset=manifest", "dataset.manifest=/m.csv", f"dense.on_excess={now}")
    values = config.model_dump(mode="json")
    values["dataset"] = {**FLAT, "path": None, "folder": "/slides", "size_px": 9000, **values["dataset"]}
    del values["dense"]["on_excess"]
    values["dense"]["beyond"] = former
    path = tmp_path / "cases.json"
    path.write_text(json.dumps({"config": values, "cases": []}))
    assert read_cases(path) == (config, ())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inference.strid=32", r"there is no key inference\.strid; did you mean inference\.stride\?"),
        ("+inference.strid=32", r"there is no key inference\.strid \(did you mean inference\.stride\?\)"),
        ("++inference.strid=32", r"there is no key inference\.strid \(did you mean inference\.stride\?\)"),
        ("stride=32", r"did you mean inference\.stride\?"),
        ("inferense.stride=32", r"did you mean inference\.stride\?"),
        ("infrence=dense", r"there is no key infrence; did you mean inference\?"),
        ("executor=slrum_array", r"did you mean executor=slurm_array\? choices: dask, .*slurm_array"),
        ("model=3", r"no such choice; choices: card, demo, googlenet, pcam"),
        ("+executor=inline", r"executor has a choice already; write executor=NAME: dask"),
        (
            "executor.array.window=3",
            r"no key executor\.array\.window with this executor; choose another: executor=dask",
        ),
        ("+name=x", r"name has a value already; write name=VALUE"),
        ("~inference.strides", r"there is no key inference\.strides; did you mean inference\.stride\?"),
        ("~inference.stride", r"inference\.stride has no value"),
        ("~executor", r"executor has no value"),
        ("inference.stride", r"has no '='; write inference\.stride=VALUE"),
        ("inference.stride =32", r"write inference\.stride=32"),
        ("=3", "has no key before its '='"),
        ("evaluation.exclude=[a,b", r"an unmatched '\['; close it, such as 'evaluation\.exclude=\[a,b\]'"),
        ("name='a", r"write \"name='a'\""),
        ("evaluation.exclude=a (1)", r"write \"evaluation\.exclude='a \(1\)'\""),
        ("name=a,b", r"names several values; quote it: \"name='a,b'\"; list them: 'name=\[a,b\]'"),
        ("name=${nothing}", "'nothing' not found"),
        (
            "dense.beyond=tell",
            r"was renamed dense\.on_excess; .*on_excess=fail for stop, dense\.on_excess=report for tell",
        ),
        ("++dense.beyond=tell", r"was renamed dense\.on_excess: write dense\.on_excess=report"),
    ],
)
def test_what_hydra_refuses_is_told_by_its_right_form(override: str, message: str) -> None:
    """The message is one line, without Hydra's advice to add keys, which would be refused too."""
    with pytest.raises(InputError, match=message) as refused:
        composed(override)
    text = str(refused.value)
    assert "\n" not in text
    assert "hydra.cc" not in text
    assert "+" not in text


def test_a_folder_that_is_not_given_is_that_of_data_model_and_settings(monkeypatch) -> None:
    """The folder is the same for the same command on another executor, and differs for other slides or numbers."""
    one = ["dataset=single", "dataset.path=/slides/one.svs"]
    first = composed(*one).out
    assert first.parent == Path("runs").absolute()
    assert first.name.startswith("one-demo-")
    same = ["executor=inline", "tracking=off", "store=none", "allow_partial=true", "dense.on_excess=report"]
    assert composed(*one, *same).out == first
    assert composed("dataset=single", "dataset.path=/slides/./one.svs").out == first
    other = [["dataset.path=/else/one.svs"], ["model=pcam"], ["inference.stride=32"], ["seed=1"], ["repeat=2"]]
    assert len({composed(*one, *each).out for each in other} | {first}) == len(other) + 1
    assert composed("name=mine").out == Path("runs/mine").absolute()
    slide = {"kind": "single", "path": "/slides/one.svs"}
    assert default_name({"dataset": slide}) == default_name({"dataset": {**FLAT, **slide}}), (
        "as earlier versions named it"
    )
