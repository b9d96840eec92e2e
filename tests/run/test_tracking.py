"""Tracking: one record per run in MLflow, whatever happens to the store."""

import base64
import errno
import fcntl
import json
import math
import multiprocessing
import os
import re
import shutil
import socket
import sqlite3
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from small_runs import wsiflow

from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.run import tracking
from wsiflow.run.tracking import DatasetRecord, RunRecord, TrackingParams, entries, reading
from wsiflow.run.tracking import store as stores
from wsiflow.system import processes


def params_for(uri: str, **given: Any) -> TrackingParams:
    """Return tracking settings for a store."""
    settings = {"kind": "mlflow", "experiment": "test", "sweep": None, "timeout_s": 1, "retries": 0, "lock_wait_s": 90}
    return TrackingParams(uri=uri, **{**settings, **given})


def record(**given: Any) -> RunRecord:
    """Return a record with every kind of content, with changes."""
    content = {
        "name": "run",
        "key": "abc123",
        "plan_hash": "feed",
        "partial": False,
        "params": {"inference.stride": 16},
        "metrics": {"froc.score": 0.5, "roc.auc": math.nan, "throughput.efficiency": math.inf},
        "tags": {},
        "dataset": DatasetRecord("cases.csv", "d1"),
        "artifacts": [],
        "figures": {},
        "tables": {},
    }
    return RunRecord(**{**content, **given})


START = {"name": "stride=56", "folder": "f1", "out": "/runs/a", "sweep_folder": "", "driver": processes.current()}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a SQLite store for all tests that only add to it, each with its own keys."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Return the address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def read(store: str, run_id: str | None) -> Any:
    """Return a run as MLflow has it."""
    from mlflow import MlflowClient

    assert run_id is not None
    return MlflowClient(tracking_uri=store).get_run(run_id)


def all_runs(store: str, experiment: str) -> list[Any]:
    """Return every run of an experiment."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_runs([found.experiment_id]))


def test_everything_arrives(store: str, tmp_path: Path) -> None:
    """Parameters, metrics, tags, files, folders, figures and tables of one run."""
    config = tmp_path / "config.yaml"
    config.write_text("seed: 0\n")
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "summary.json").write_text("{}")
    content = record(
        artifacts=[config, folder],
        figures={"froc.png": b"\x89PNG"},
        tables={"froc.json": {"fp_per_slide": [8.0, 0.0], "thresholds": [0.1, math.inf]}},
        documents={"settings.json": {"inference.stride": 16, "password": "canary"}},
        dataset=DatasetRecord("cases.csv", "d1", "/data/cases.csv", 6),
        description="![FROC](get-artifact?run_uuid={run})",
    )
    logged = tracking.log_run(params_for(store), content)
    run = read(store, logged.run_id)
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params == {"inference.stride": "16"}
    assert run.data.metrics == {"froc.score": 0.5}
    assert run.data.tags["wsiflow.metrics_without_value"] == "roc.auc, throughput.efficiency"
    assert run.data.tags["wsiflow.plan_hash"] == "feed"
    assert run.data.tags["mlflow.note.content"] == f"![FROC](get-artifact?run_uuid={logged.run_id})"
    assert {"mlflow.user", "mlflow.source.name", "mlflow.source.type"} <= run.data.tags.keys()
    (slides,) = run.inputs.dataset_inputs
    assert (slides.dataset.name, json.loads(slides.dataset.source)) == ("cases.csv", {"uri": "/data/cases.csv"})
    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    assert artifacts.is_relative_to(Path(store.removeprefix("sqlite:///")).parent)
    found = {str(path.relative_to(artifacts)) for path in artifacts.rglob("*") if path.is_file()}
    assert found == {"config.yaml", "evaluation/summary.json", "figures/froc.png", "froc.json", "settings.json"}
    assert json.loads((artifacts / "settings.json").read_text())["password"] == "[redacted]"
    table = json.loads((artifacts / "froc.json").read_text())
    assert table == {"columns": ["fp_per_slide", "thresholds"], "data": [[8.0, 0.1], [0.0, None]]}


def test_the_same_run_is_recorded_once(store: str) -> None:
    """A second record with the same key returns the first; a partial one is another."""
    params = params_for(store, experiment="once")
    first, again = (tracking.log_run(params, record()) for _ in range(2))
    assert first == again
    assert tracking.log_run(params, record(partial=True)).run_id != first.run_id


def test_a_record_that_is_there_is_found_without_mlflow(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished record is found by SQL; a deleted one, or one of another experiment, is not."""
    params, one = params_for(store), record(key="known", tags={"wsiflow.folder": "of known"})
    run_id = tracking.log_run(params, one).run_id
    with monkeypatch.context() as without:
        without.setattr("wsiflow.run.tracking.runs.with_store", None)
        assert tracking.log_run(params, one)[:2] == (run_id, "")
        assert tracking.begin_run(params, tracking.RunStart(**{**START, "folder": "of known"})).run_id == run_id
    assert reading.known_to_sqlite(params, "wsiflow.key", "known", ("yes",)) is None
    assert reading.known_to_sqlite(params_for(store, experiment="other"), "wsiflow.key", "known", ("no",)) is None
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=store).delete_run(run_id)
    assert reading.known_to_sqlite(params, "wsiflow.key", "known", ("no",)) is None
    assert tracking.log_run(params, one).run_id not in {run_id, None}


def test_remains_of_a_broken_record_are_replaced(store: str, tmp_path: Path) -> None:
    """A failed record is reported, and recording again leaves one finished run."""
    params = params_for(store, experiment="broken")
    failed = tracking.log_run(params, record(artifacts=[tmp_path / "absent.json"]))
    assert failed.run_id is None
    assert "absent.json" in failed.reason
    logged = tracking.log_run(params, record())
    assert [(run.info.run_id, run.info.status) for run in all_runs(store, "broken")] == [(logged.run_id, "FINISHED")]


def test_runs_of_a_sweep_share_a_parent(store: str) -> None:
    """Runs of one folder are children of one parent, and a sweep of the same name elsewhere has its own."""
    from mlflow import MlflowClient

    params, client = params_for(store, experiment="sweeps", sweep="stride's"), MlflowClient(tracking_uri=store)
    former = tracking.begin_sweep(params, Path("/c"))
    client.delete_tag(former.run_id, "wsiflow.sweep_folder")  # as earlier versions recorded it
    runs = [
        tracking.log_run(params, record(key=key, sweep_folder=folder, tags={"wsiflow.out": f"{folder}/{key}"}))
        for folder, key in (("/c", "k0"), ("/a", "k1"), ("/a", "k2"), ("/b", "k3"), ("/c", "k4"))
    ]
    parents = [read(store, run.run_id).data.tags["mlflow.parentRunId"] for run in runs]
    assert parents[1] == parents[2]
    assert parents[0] == parents[4] == former.run_id
    assert len(set(parents)) == 3
    assert read(store, parents[1]).info.run_name == "stride's"
    assert len(all_runs(store, "sweeps")) == 8


def test_a_run_is_seen_while_it_runs_and_when_it_fails(store: str) -> None:
    """A run is running, fails with its reason, is begun again in the same record, and finishes in it."""
    params = params_for(store, experiment="begun")
    start = tracking.RunStart(**START)
    begun = tracking.begin_run(params, start)
    assert read(store, begun.run_id).info.status == "RUNNING"
    assert tracking.fail_run(params, start, "slide a: it is empty; replace it").run_id == begun.run_id
    failed = read(store, begun.run_id)
    assert failed.info.status == "FAILED"
    assert failed.data.tags["mlflow.note.content"] == "**Failed:** slide a: it is empty; replace it"
    assert tracking.begin_run(params, start).run_id == begun.run_id
    assert "mlflow.note.content" not in read(store, begun.run_id).data.tags
    logged = tracking.log_run(params, record(key="k", tags={"wsiflow.folder": "f1"}))
    assert (logged.run_id, read(store, begun.run_id).info.status) == (begun.run_id, "FINISHED")
    assert tracking.begin_run(params, start) == logged, "a folder that has a record is not begun again"
    assert len(all_runs(store, "begun")) == 1


def test_a_run_whose_slide_is_rejected_is_seen_with_the_reason(store: str, tmp_path: Path) -> None:
    """A run that ends without scores leaves a failed record."""
    (tmp_path / "no.tif").write_text("no slide")
    given = ["dataset=single", f"dataset.path={tmp_path}/no.tif", f"out={tmp_path / 'bad'}", f"tracking.uri={store}"]
    given += ["orchestrator=none", "executor=inline", "tracking.experiment=rejected", "name=mine"]
    assert wsiflow(*given) == 20
    (failed,) = all_runs(store, "rejected")
    assert (failed.info.run_name, failed.info.status) == ("mine", "FAILED")
    assert re.search("rejected: slide no.*not a slide", failed.data.tags["wsiflow.reason"])


def test_a_run_that_was_killed_is_marked_at_the_next_start(store: str) -> None:
    """The run of a process that has ended is killed; that of a process that may live goes on."""
    params = params_for(store, experiment="killed")
    dead = processes.current()._replace(born="1")
    elsewhere = processes.current()._replace(host="another")
    ids = [
        tracking.begin_run(params, tracking.RunStart(**{**START, "folder": folder, "driver": driver})).run_id
        for folder, driver in (("dead", dead), ("elsewhere", elsewhere), ("here", processes.current()))
    ]
    assert [read(store, one).info.status for one in ids] == ["KILLED", "RUNNING", "RUNNING"]
    assert "was killed" in read(store, ids[0]).data.tags["mlflow.note.content"]


def test_a_classifier_is_registered_once(store: str) -> None:
    """Each identity of a card is a version with the card as its artifact, and a run names its version."""
    from mlflow import MlflowClient

    params, client = params_for(store, experiment="registry"), MlflowClient(tracking_uri=store)
    one = tracking.ModelRecord("tiny", "a" * 64, "inception", '{"name": "tiny"}', "Trained on nothing.")
    models = (one, one, one._replace(identity="b" * 64))
    ids = [tracking.log_run(params, record(key=f"m{n}", model=model)).run_id for n, model in enumerate(models)]
    versions = {int(found.version): found for found in client.search_model_versions("name = 'tiny'")}
    assert {number: found.tags["wsiflow.model_hash"][0] for number, found in versions.items()} == {1: "a", 2: "b"}
    named = [read(store, run_id).data.tags["wsiflow.model"] for run_id in ids]
    assert named == ["tiny, version 1", "tiny, version 1", "tiny, version 2"]
    card = Path(versions[1].source.removeprefix("file://")) / "card.json"
    assert json.loads(card.read_text()) == {"name": "tiny"}


def test_an_experiment_opens_with_its_view(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first record of an experiment saves a view, which the link names; a store may refuse views."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    params = params_for(store, experiment="viewed")
    logged = tracking.log_run(params, record(key="viewed"))
    tags = MlflowClient(tracking_uri=store).get_experiment(logged.experiment_id).tags
    (line, _, command) = tracking.opening_lines(params, logged)
    key = re.search("viewStateShareKey=([^&]+)", line)
    assert key is not None
    packed = json.loads(tags[f"mlflow.sharedViewState.{key[1]}"])["state"].removeprefix("deflate;")
    state = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert {"metrics.`froc.score`", "params.`inference.stride`", "tags.`froc.interval`"} <= set(
        state["selectedColumns"]
    )
    assert f"#/experiments/{logged.experiment_id}/runs?workflowType=machine_learning" in line
    assert command.endswith(f"mlflow server --workers 1 --port 5000 --backend-store-uri {store}")
    with monkeypatch.context() as refusing:
        refusing.setattr(MlflowClient, "set_experiment_tag", mock.Mock(side_effect=MlflowException("no more views")))
        refused = params_for(store, experiment="refused", sweep="s")
        assert tracking.log_sweep(refused, Path("/x"), "a view is not all there is").reason == ""
    lines = tracking.opening_lines(params_for("https://joe:canary@mlflow.lab/"), logged)
    assert [one.partition("#")[0] for one in lines] == ["https://[redacted]@mlflow.lab/"] * 2


def test_an_experiment_that_was_deleted_is_named(store: str) -> None:
    """Neither a record nor a comparison uses a deleted experiment, and both name the way back."""
    from mlflow import MlflowClient

    params = params_for(store, experiment="deleted")
    logged = tracking.log_run(params, record())
    MlflowClient(tracking_uri=store).delete_experiment(logged.experiment_id)
    command = rf"MLFLOW_TRACKING_URI=\S+ mlflow experiments restore --experiment-id {logged.experiment_id}"
    said = rf"was deleted; restore it \({command}\)"
    assert re.search(said, tracking.log_run(params, record()).reason)
    with pytest.raises(InputError, match=said):
        tracking.tracked_runs(params)


def test_a_store_that_was_moved_is_named(store: str, tmp_path: Path) -> None:
    """Beside a database that was moved without its artifacts nothing is written, nor where they lay before."""
    tracking.log_run(params_for(store), record(key="there"))
    former = Path(store.removeprefix("sqlite:///"))
    shutil.copy(former, tmp_path)
    moved = tracking.log_run(params_for(f"sqlite:///{tmp_path}/mlflow.db"), record(key="moved"))
    assert moved.run_id is None
    assert f"keeps its files in {former.parent}/mlflow-artifacts, which is not beside {tmp_path}" in moved.reason


def test_a_database_that_another_program_locks_is_waited_for(store: str, caplog: Any, capfd: Any) -> None:
    """A record waits for SQLite's lock as long as it may, then says so in one line and nothing else."""
    path = store.removeprefix("sqlite:///")
    tracking.log_run(params_for(store), record(key="before"))
    with closing(sqlite3.connect(path)) as other:
        other.execute("begin immediate")
        logged = tracking.log_run(params_for(store, lock_wait_s=0.3), record(key="while"))
    assert re.search("kept it locked for 0.3 s .*run the same command again to record it", logged.reason)
    assert (caplog.records, capfd.readouterr().err) == ([], "")


def test_a_path_with_a_question_mark_is_refused(tmp_path: Path) -> None:
    """What follows a question mark in the address of a SQLite store is no path, so nothing is written elsewhere."""
    logged = tracking.log_run(params_for(f"sqlite:///{tmp_path}/x?y/mlflow.db"), record())
    assert "a path with a question mark cannot be" in logged.reason
    assert not list(tmp_path.iterdir())


GIT = {
    "absent": None,
    "refused": "echo 'fatal: detected dubious ownership in repository' >&2; exit 128",
    "empty repository": "echo HEAD; exit 128",
    "something else": "echo hello",
    "hangs": "exec sleep 60",
    "not text": "printf '\\377\\376'",
}


@pytest.mark.parametrize("how", GIT)
def test_a_record_needs_no_git(how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where git fails or is absent, no commit is recorded."""
    monkeypatch.setattr(entries, "_GIT_S", 0.5)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    if GIT[how] is None:
        monkeypatch.setenv("PATH", "/nowhere")
    else:
        (tmp_path / "git").write_text(f"#!/bin/sh\n{GIT[how]}\n")
        (tmp_path / "git").chmod(0o755)
    assert entries.git_commit(Path(__file__).parents[2]) == ""


def test_the_commit_of_a_checkout_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit is the forty hexadecimal digits of git."""
    (tmp_path / "git").write_text(f"#!/bin/sh\necho {'0a' * 20}\n")
    (tmp_path / "git").chmod(0o755)
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert entries.git_commit(tmp_path) == "0a" * 20
    assert entries.git_commit(tmp_path / "elsewhere") == ""


@pytest.mark.parametrize(
    ("kept", "environment", "found"),
    [
        ("http://h:5", {"MLFLOW_TRACKING_URI": "http://other"}, "http://h:5"),
        ("http://[redacted]@h:5", {"MLFLOW_TRACKING_URI": "http://u:p@h:5"}, "http://u:p@h:5"),
        ("http://[redacted]@h:5", {"MLFLOW_TRACKING_USERNAME": "u", "MLFLOW_TRACKING_PASSWORD": "p"}, "http://h:5"),
        ("http://[redacted]@h:5", {"MLFLOW_TRACKING_URI": "http://u:p@other:5"}, None),
        ("http://h/?token=[redacted]", {"MLFLOW_TRACKING_TOKEN": "t"}, None),
        ("http://[redacted]@h:5", {}, None),
    ],
)
def test_what_a_folder_does_not_keep_is_taken_from_the_environment(
    kept: str, environment: dict[str, str], found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The password of an address is taken from the environment, or the record fails with the reason."""
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if found is not None:
        assert stores.whole(kept) == found
    else:
        logged = tracking.log_run(params_for(kept), record())
        assert logged.run_id is None
        assert "set MLFLOW_TRACKING_URI to the whole address, then run the same command again" in logged.reason


def test_a_store_without_locks_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a disk without locks the message names the file and the remedy."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    logged = tracking.log_run(params_for(f"sqlite:///{tmp_path}/mlflow.db"), record())
    assert logged.run_id is None
    assert re.search(r"mlflow\.db\.lock: .*No locks available.*a disk with a lock service", logged.reason)


def test_more_than_mlflow_takes_at_once(store: str) -> None:
    """More than a hundred parameters, more than a thousand metrics, long values and odd names are recorded."""
    settings = {f"p{i}": i for i in range(101)} | {"long": "x" * 9000, "+odd[0]": 1}
    numbers = {f"m{i}": float(i) for i in range(1001)}
    logged = tracking.log_run(params_for(store), record(key="many", params=settings, metrics=numbers))
    data = read(store, logged.run_id).data
    assert len(data.params) == 103
    assert len(data.params["long"]) == 6000
    assert data.params["_odd_0_"] == "1"
    assert data.metrics == numbers


def test_secrets_stay_at_home(store: str) -> None:
    """The database contains neither the password nor the user of an address."""
    settings = {"store.api_key": "canary-1", "server": "https://joe:canary-2@host/x"}
    logged = tracking.log_run(params_for(store), record(key="secret", params=settings, tags={"token": "canary-3"}))
    assert read(store, logged.run_id).data.params["server"] == "https://[redacted]@host/x"
    assert b"canary" not in Path(store.removeprefix("sqlite:///")).read_bytes()


def _first_start(uri: str, key: str, barrier: Any, results: Any) -> None:
    barrier.wait()
    results.put(tracking.log_run(params_for(uri), record(key=key)))


def test_first_starts_at_the_same_time(tmp_path: Path) -> None:
    """Two processes on a new store record two runs in one experiment."""
    context = multiprocessing.get_context("spawn")
    uri, barrier, results = f"sqlite:///{tmp_path}/new/mlflow.db", context.Barrier(2), context.Queue()
    processes = [context.Process(target=_first_start, args=(uri, f"k{i}", barrier, results)) for i in range(2)]
    for process in processes:
        process.start()
    logged = [results.get(timeout=200) for _ in processes]
    for process in processes:
        process.join()
    assert [item.reason for item in logged] == ["", ""]
    assert {run.info.run_id for run in all_runs(uri, "test")} == {item.run_id for item in logged}


def _killed_start(uri: str) -> None:
    from mlflow.store.db import utils

    utils._upgrade_db = lambda *_: os._exit(137)  # some of the tables are there
    tracking.log_run(params_for(uri), record())


def test_a_store_whose_creation_was_killed_is_created_again(tmp_path: Path) -> None:
    """Half a store would take no record for ever: it has its name only when it is whole, and a group may share it."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    process = multiprocessing.get_context("spawn").Process(target=_killed_start, args=(uri,))
    process.start()
    process.join()
    assert process.exitcode == 137
    before = os.umask(0o002)
    try:
        assert tracking.log_run(params_for(uri), record()).reason == ""
    finally:
        os.umask(before)
    assert not list(tmp_path.glob(".*"))
    assert (tmp_path / "mlflow.db").stat().st_mode & 0o777 == 0o664


def test_off_records_nothing(tmp_path: Path) -> None:
    """With tracking off nothing is written, and the reason says so."""
    logged = tracking.log_run(params_for(f"sqlite:///{tmp_path}/mlflow.db", kind="off"), record())
    assert logged[:2] == (None, "tracking is off")
    assert not list(tmp_path.iterdir())


def test_no_server_is_a_reason_not_an_error() -> None:
    """A refused connection ends soon, and the reason has the address without password."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    logged = tracking.log_run(params_for(f"http://joe:canary@127.0.0.1:{port}", retries=1), record())
    assert logged.run_id is None
    assert f"127.0.0.1:{port}" in logged.reason
    assert "canary" not in logged.reason
    assert "\n" not in logged.reason


def test_a_store_whose_driver_is_not_installed_is_a_reason() -> None:
    """An error of a database driver is a reason and not an error of the run."""
    params = params_for("mssql+pyodbc://joe:canary@127.0.0.1/runs")
    logged = tracking.log_run(params, record())
    assert logged.run_id is None
    assert "pyodbc" in logged.reason
    assert "canary" not in logged.reason
    with pytest.raises(EnvironmentFault, match="pyodbc"):
        tracking.tracked_runs(params)


def test_a_silent_server_is_given_up(silent_server: str) -> None:
    """A server that never answers is given up after the timeout."""
    start = time.monotonic()
    logged = tracking.log_run(params_for(silent_server), record())
    assert logged.run_id is None
    assert time.monotonic() - start < 300


def test_a_locked_store_is_waited_for_and_then_given_up(tmp_path: Path) -> None:
    """A locked store is not touched, and the reason names the lock."""
    params = params_for(f"sqlite:///{tmp_path}/mlflow.db", lock_wait_s=0.2)
    with stores.only_writer(params):
        logged = tracking.log_run(params, record())
    assert "locked for 0.2 s" in logged.reason
    assert not (tmp_path / "mlflow.db").exists()


def test_a_store_that_is_no_database(tmp_path: Path) -> None:
    """An unusable path is a reason, not an error."""
    (tmp_path / "file").write_text("")
    logged = tracking.log_run(params_for(f"sqlite:///{tmp_path}/file/mlflow.db"), record())
    assert logged.run_id is None
    assert "file" in logged.reason


def test_the_database_is_a_plain_sqlite_file(store: str) -> None:
    """Another program can read the metrics without mlflow."""
    tracking.log_run(params_for(store), record(key="plain", metrics={"only.here": 2.5}))
    with sqlite3.connect(store.removeprefix("sqlite:///")) as database:
        assert database.execute("select value from metrics where key = 'only.here'").fetchall() == [(2.5,)]
