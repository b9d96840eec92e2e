"""Redaction: which parts of settings and messages are replaced, and which are kept."""

import json
from pathlib import Path
from typing import Any

import pytest
from damage import overwrite
from hypothesis import given
from hypothesis import strategies as st

from flows import cli, compose
from wsiflow.errors import InputError
from wsiflow.redaction import REDACTED, holds_redacted, redacted, redacted_list, without_secrets
from wsiflow.run import cases

HELD = [
    "http://joe:canary@host:5000/x",
    "http://canary@host",
    "postgresql+psycopg2://joe:can@ary@host:5432/db",
    "http://joe:ca/nary@host/x",
    "mysql://host/db?user=joe&password=canary&ssl=true",
    "https://host/api?x=1&access_token=canary",
    "https://host/blob?sv=2024&sig=canary%2Fx%3D",
    "host=h password=canary user=joe",
    "password='ca nary' user=joe",
    "--token=canary",
    "AWS_SECRET_ACCESS_KEY=canary,HOME",
    "-v API_KEY=canary",
    "password=can,ary",
    "Authorization: Bearer canary12345",
    "header {'X-Api-Key': 'canary'}",
    '{"password": "canary", "user": "joe"}',
    "tracking.uri='http://joe:canary@host' is refused",
    "s3://AKIA:canary@bucket/x",
    "executor.dask.cluster_kwargs.auth_string=canary",
]
LEFT = [
    "http://127.0.0.1:5000/x@2",
    "https://host/picture@2x.png",
    "sqlite:////data/a:b/c@d.db",
    "sqlite:///runs/mlflow.db?timeout=5",
    "slide token_1: no tissue; correct the path",
    "the token was refused",
    "inference.stride=32,name=keyword",
    "author=me",
    "model.trust_torchscript=true",
    "$TASK_ID.log",
    "me@host:/data",
]


@pytest.mark.parametrize("text", HELD)
def test_a_secret_in_a_text_is_redacted(text: str) -> None:
    """Secrets in URLs, queries, connection strings, options, headers and dictionaries are replaced, once."""
    result = without_secrets(text)
    assert not any(part in result for part in ("canary", "nary", "can@", "can,", "ary@")), result
    assert REDACTED in result
    assert without_secrets(result) == result


@pytest.mark.parametrize("text", LEFT)
def test_other_texts_are_kept(text: str) -> None:
    """Ports, file names and words in sentences are kept."""
    assert without_secrets(text) == text


GONE = REDACTED


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"a": {"password": "x", "stride": 16}, "name": "key"}, {"a": {"password": GONE, "stride": 16}, "name": "key"}),
        ({"urls": ["http://u:p@h", 3]}, {"urls": [f"http://{GONE}@h", 3]}),
        ({"token": None, "auth": True, "secret": ""}, {"token": None, "auth": True, "secret": ""}),
        ({"pin_token": 7}, {"pin_token": GONE}),
        ({"credentials": {"user": "u", "keys": ["k"]}}, {"credentials": {"user": GONE, "keys": [GONE]}}),
        ({"x.api_key": "k", "authors": ["a"]}, {"x.api_key": GONE, "authors": ["a"]}),
    ],
)
def test_values_with_the_name_of_a_secret_are_redacted(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    """Values are replaced at any depth, except switches and empty values."""
    assert redacted(settings) == expected


def test_an_argument_after_its_option_is_redacted() -> None:
    """An option and its value are often two arguments."""
    given = ["--password", "canary", "--partition", "cpu", "--token", "--quiet", "--env", "API_KEY=canary"]
    expected = ["--password", REDACTED, "--partition", "cpu", "--token", "--quiet", "--env", f"API_KEY={REDACTED}"]
    assert redacted_list(given) == expected
    assert holds_redacted({"a": [expected]})
    assert not holds_redacted({"a": ["x", None, 3]})


@given(st.text())
def test_any_text_can_be_redacted(text: str) -> None:
    """No text raises an error, and a second redaction changes nothing."""
    assert without_secrets(without_secrets(text)) == without_secrets(text)


@pytest.mark.parametrize("executor", ["process", "slurm_array", "sge_array", "pbs_array", "lsf_array", "dask_slurm"])
def test_shipped_settings_hold_no_secret(executor: str) -> None:
    """For a run without secrets the folder has the complete configuration."""
    settings = compose.compose_config([f"executor={executor}"]).model_dump(mode="json")
    assert redacted(settings) == settings
    assert not holds_redacted(settings)


def test_settings_that_are_written_hold_no_secret() -> None:
    """The files of a run and the parameters for Prefect and MLflow are all redacted by the same function."""
    given = [
        "executor=dask_slurm",
        "tracking.uri='http://joe:canary@host'",
        "+executor.dask.cluster_kwargs.password=canary",
        "+executor.dask.cluster_kwargs.job_extra_directives=['--export=API_KEY=canary']",
    ]
    config = compose.compose_config(given)
    assert config.tracking.uri == "http://joe:canary@host", "who runs it knows"
    assert "canary" not in json.dumps(config.model_dump(mode="json"))
    arrays = compose.compose_config(["executor=slurm_array", "executor.array.extra=['--comment','token=canary']"])
    assert "canary" not in arrays.model_dump_json()


def test_an_error_holds_no_secret() -> None:
    """Messages end in tables, logs and servers, so they must not contain secrets."""
    message = str(InputError("http://joe:canary@host does not answer", "see password=canary", path="s3://k:canary@b"))
    assert "canary" not in message
    with pytest.raises(InputError) as caught:
        compose.compose_config(
            ["executor=dask_slurm", "tracking.uri=''", "tracking.experiment='api_key=canary'", "seed=-1"]
        )
    assert "canary" not in str(caught.value)


def test_a_folder_keeps_no_secret_and_one_generation(tmp_path: Path) -> None:
    """A start, a retry with the stored settings and a folder of a former version add at most one generation."""
    config = compose.compose_config([f"out={tmp_path / 'run'}", "tracking.uri='http://joe:canary@host'"])
    root = config.out
    cases.write_cases(root, config, [])
    kept, _ = cases.read_cases(root / "cases.json")
    assert kept.tracking.uri == f"http://{REDACTED}@host"
    for again in (config, kept):
        assert cases.write_cases(root, again, []) == root / "cases.json"
    assert not [path for path in root.rglob("*") if path.is_file() and b"canary" in path.read_bytes()]
    overwrite(root / "cases.json", (root / "cases.json").read_text().replace(REDACTED, "joe:canary"))
    names = {cases.write_cases(root, config, []).name for _ in range(2)}
    assert names == {"cases.2.json"}
    assert {path.name for path in root.glob("config*.yaml")} == {"config.yaml"}


def test_a_retry_that_lacks_a_secret_of_its_workers_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cluster is not started with a redacted password; the message says that the first command has it."""
    given = ["executor=dask_slurm", "+executor.dask.cluster_kwargs.password=canary", f"out={tmp_path}"]
    cases.write_cases(tmp_path, compose.compose_config(given), [])
    assert cli.main(["retry", str(tmp_path)]) == 20
    assert "start it with the wsiflow run command that began it" in capsys.readouterr().err
