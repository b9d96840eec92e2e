"""Sweeps: every job a folder and a record of its own, and a bad job does not stop the others."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import mlflow
from serving import environment
from test_line import over

from flows import run as command
from wsiflow import evaluation

WSIFLOW = Path(sys.executable).parent / "wsiflow"
QUICK = ["dataset.limit=1", "tracking=mlflow", "name=together", "evaluation.bootstrap=0"]


def sweep(manifest: Path, out: Path, env: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    command = [WSIFLOW, "run", "-m", *over(manifest, out, *QUICK, *more)]
    return subprocess.run(command, env=env, cwd=out.parent, capture_output=True, text=True, check=False)


def rows(database: Path, query: str) -> list[tuple]:
    with sqlite3.connect(database) as opened:
        assert opened.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return opened.execute(query).fetchall()


def children(database: Path) -> tuple[set[str], set[str]]:
    """Return the strides that MLflow has runs of, and the parents of these runs."""
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{database}")
    runs = client.search_runs([client.get_experiment_by_name("wsiflow").experiment_id])
    trials = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert all(run.info.status == "FINISHED" for run in runs)
    assert len(runs) == len(trials) + 1, "every run that is no trial is the parent"
    strides, parents = zip(
        *((run.data.params["inference.stride"], run.data.tags["mlflow.parentRunId"]) for run in trials), strict=True
    )
    return set(strides), set(parents)


def test_a_sweep_of_two_good_jobs_and_a_bad_one(small_slides: Path, tmp_path: Path, capsys) -> None:
    """Folders are named after what was swept; the exit code is that of the worst job; MLflow nests the good ones."""
    arguments = ["dataset=manifest", f"dataset.manifest={small_slides}", "dataset.limit=1", "executor=inline"]
    arguments += ["orchestrator=none", "evaluation.bootstrap=0", "name=strides", f"out={tmp_path / 'sweep'}"]
    arguments += [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]  # Hydra writes the colon otherwise for a trial
    arguments += ["+hydra.job.env_set.EXAMPLE_API_KEY=canary"]
    assert command.main(["run", "-m", "inference.stride=112,30,224", *arguments]) == 20
    assert not [path for path in (tmp_path / "sweep").rglob("*") if path.is_file() and b"canary" in path.read_bytes()]
    assert "EXAMPLE_API_KEY" in (tmp_path / "sweep/multirun.yaml").read_text()
    said = capsys.readouterr()
    assert "inference.stride is 30" in said.err
    for stride in (112, 224):
        assert (tmp_path / f"sweep/inference.stride={stride}/evaluation/summary.json").exists()
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("wsiflow")
    runs = client.search_runs([experiment.experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert {run.data.params["inference.stride"] for run in children} == {"112", "224"}
    assert len({run.data.tags["mlflow.parentRunId"] for run in children}) == 1
    assert all("throughput.tiles_per_s" in run.data.metrics for run in children)
    matched = evaluation.read_matches(tmp_path / "sweep/inference.stride=112/evaluation/matches.json")
    for run in children:
        assert run.data.tags["wsiflow.protocol_hash"] == matched.protocol_hash
        assert run.data.tags["wsiflow.truth_hash"] == matched.truth_hash()
        assert "matches.json" in {artifact.path for artifact in client.list_artifacts(run.info.run_id)}


def test_trials_at_once_share_a_server_and_a_record(small_slides: Path, tmp_path: Path) -> None:
    """Four good joblib trials from nothing: four flows in Prefect's database, four runs under one parent, both sound.

    Two bad ones among them fail alone, and the exit code is theirs.
    """
    more = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=4", "inference.stride=56,224", "seed=1,2,-1", "store=none"]
    done = sweep(small_slides, tmp_path / "sweep", environment(tmp_path / "home"), "orchestrator=prefect", *more)
    assert done.returncode == 20, done.stderr
    assert done.stderr.count("seed") == 2
    assert done.stdout.count("going on with a temporary one") == 1
    strides, parents = children(tmp_path / "mlflow.db")
    assert (strides, len(parents)) == ({"56", "224"}, 1)
    assert rows(tmp_path / "mlflow.db", "select count(*) from runs") == [(5,)]
    flows = rows(tmp_path / "home/prefect.db", "select state_type, count(*) from flow_run group by 1")
    assert flows == [("COMPLETED", 4)]
    folders = {path.parent.parent.name for path in tmp_path.glob("sweep/*/evaluation/summary.json")}
    assert folders == {f"inference.stride={stride},seed={seed}" for stride in (56, 224) for seed in (1, 2)}


def test_trials_are_slurm_jobs(slurm: dict[str, str], small_slides: Path, tmp_path: Path) -> None:
    """Through submitit on a real Slurm: each trial an element of an array, all under one parent."""
    more = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=5", "hydra.launcher.mem_gb=2"]
    more += ["hydra.launcher.cpus_per_task=1", "inference.stride=56,224", "executor=process"]
    done = sweep(small_slides, tmp_path / "sweep", environment(tmp_path / "home") | slurm, *more)
    assert done.returncode == 0, done.stderr
    strides, parents = children(tmp_path / "mlflow.db")
    assert (strides, len(parents)) == ({"56", "224"}, 1)
    assert rows(tmp_path / "mlflow.db", "select count(*) from runs") == [(3,)]
    assert len(list((tmp_path / "sweep/.submitit").glob("*_[01]"))) == 2
