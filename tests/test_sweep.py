"""Sweeps: every job a folder and a record of its own, and a bad job does not stop the others."""

from pathlib import Path

import mlflow

from flows import run as command


def test_a_sweep_of_two_good_jobs_and_a_bad_one(small_slides: Path, tmp_path: Path, capsys) -> None:
    """Folders are named after what was swept; the exit code is that of the worst job; MLflow nests the good ones."""
    arguments = ["dataset=manifest", f"dataset.manifest={small_slides}", "dataset.limit=1", "executor=inline"]
    arguments += ["orchestrator=none", "evaluation.bootstrap=0", "name=strides", f"out={tmp_path / 'sweep'}"]
    assert command.main(["run", "-m", "inference.stride=112,30,224", *arguments]) == 20
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
