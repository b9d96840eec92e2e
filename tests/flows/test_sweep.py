"""Sweeps: every job a folder and a record of its own, and a bad job does not stop the others."""

import csv
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import mlflow
import pytest
import yaml
from omegaconf import OmegaConf
from serving import environment
from small_runs import over
from swept import jobs_of

from flows import compose as command
from flows import server, trial
from flows import sweep as sweeps
from flows.cli import main
from flows.trial import Trial
from wsiflow.errors import InputError
from wsiflow.evaluation import matches

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


def test_a_sweep_of_two_good_jobs_and_a_bad_one(tiny_slides: Path, tmp_path: Path, capsys) -> None:
    """Folders are named after what was swept; the exit code is that of the worst job; MLflow nests the good ones.

    Where the same sweep is refused for its settings, the scores in its folders are left out of the comparison.
    """
    arguments = ["dataset=manifest", f"dataset.manifest={tiny_slides}", "dataset.limit=1", "executor=inline"]
    arguments += ["orchestrator=none", "evaluation.bootstrap=0", "name=strides", f"out={tmp_path / 'sweep'}"]
    arguments += [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]  # Hydra writes the colon otherwise for a trial
    arguments += ["+hydra.job.env_set.EXAMPLE_API_KEY=canary"]
    assert main(["run", "-m", "inference.stride=112,30,224", *arguments]) == 20
    assert not [path for path in (tmp_path / "sweep").rglob("*") if path.is_file() and b"canary" in path.read_bytes()]
    assert "EXAMPLE_API_KEY" in (tmp_path / "sweep/multirun.yaml").read_text()
    output = capsys.readouterr()
    assert "trial 2 of 3: inference.stride=30: configuration: inference.stride is 30" in output.err
    assert "trial 3 of 3: inference.stride=224\n" in output.out
    assert "trials     3, 1 failed: inference.stride=30\n" in output.out
    assert "compared" in output.out
    _check_composition(tmp_path / "sweep/inference.stride=112/.hydra")
    for stride in (112, 224):
        assert (tmp_path / f"sweep/inference.stride={stride}/evaluation/summary.json").exists()
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("wsiflow")
    runs = client.search_runs([experiment.experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert {run.data.params["inference.stride"] for run in children} == {"112", "224"}
    assert len({run.data.tags["mlflow.parentRunId"] for run in children}) == 1
    assert all("throughput.tiles_per_s" in run.data.metrics for run in children)
    matched = matches.read_matches(tmp_path / "sweep/inference.stride=112/evaluation/matches.json")
    for run in children:
        assert run.data.tags["wsiflow.protocol_hash"] == matched.protocol_hash
        assert run.data.tags["wsiflow.truth_hash"] == matched.truth_hash()
        assert "matches.json" in {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert main(["run", "-m", "inference.stride=112,224", *arguments, "lesions.threshold=0.4"]) == 20
    assert "compared" not in capsys.readouterr().out
    assert not (tmp_path / "sweep/.trials").exists()


def _check_composition(folder: Path) -> None:
    """Check that a folder has the files that Hydra writes."""
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    assert "inference.stride=112" in yaml.safe_load((folder / "overrides.yaml").read_text())


def test_trials_at_once_share_a_server_and_a_record(tiny_slides: Path, prefect_home: Path, tmp_path: Path) -> None:
    """Two good joblib trials: two flows in Prefect's database, two runs under one parent of a new record, both sound.

    A bad one between them fails alone, and the exit code is its own.
    """
    more = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "inference.stride=56,30,224", "store=none"]
    more += ["executor=process", "executor.workers=1"]
    done = sweep(tiny_slides, tmp_path / "sweep", environment(prefect_home), "orchestrator=prefect", *more)
    assert done.returncode == 20, done.stderr
    assert done.stderr.count("inference.stride is 30") == 1
    assert done.stdout.count("going on with a temporary one") == 1
    strides, parents = children(tmp_path / "runs/mlflow.db")
    assert (strides, len(parents)) == ({"56", "224"}, 1)
    assert rows(tmp_path / "runs/mlflow.db", "select count(*) from runs") == [(3,)]
    flows = rows(tmp_path / "home/prefect.db", "select state_type, count(*) from flow_run group by 1")
    assert flows == [("COMPLETED", 2)]
    names = rows(tmp_path / "home/prefect.db", "select name from flow_run order by 1")
    assert names == [("trial 1 of 3: stride=56",), ("trial 3 of 3: stride=224",)]
    folders = {path.parent.parent.name for path in tmp_path.glob("sweep/*/evaluation/summary.json")}
    assert folders == {"inference.stride=56", "inference.stride=224"}


def test_trials_in_turn_share_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first trial that needs a server starts it, and it ends with the sweep."""
    running: list[str] = []

    @contextmanager
    def chosen() -> Iterator[str]:
        running.append("a server")
        yield "Prefect server: here"
        running.clear()

    monkeypatch.setattr(server, "chosen_server", chosen)
    monkeypatch.setenv(trial.VARIABLE, json.dumps({"pid": os.getpid(), "folder": str(tmp_path / "records")}))
    for _trial in range(2):
        with ExitStack() as own:
            sweeps.start_server(own)
        assert running == ["a server"]
    sweeps.end()
    assert running == []


def test_trials_are_slurm_jobs(slurm: dict[str, str], tiny_slides: Path, tmp_path: Path) -> None:
    """Through submitit on a real Slurm: each trial an element of an array, all under one parent."""
    more = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=5", "hydra.launcher.mem_gb=2"]
    more += ["hydra.launcher.cpus_per_task=1", "inference.stride=56,224", "executor=process"]
    done = sweep(tiny_slides, tmp_path / "sweep", environment(tmp_path / "home") | slurm, *more)
    assert done.returncode == 0, done.stderr
    strides, parents = children(tmp_path / "runs/mlflow.db")
    assert (strides, len(parents)) == ({"56", "224"}, 1)
    assert rows(tmp_path / "runs/mlflow.db", "select count(*) from runs") == [(3,)]
    assert len(list((tmp_path / "sweep/.submitit").glob("*_[01]"))) == 2


# --- names and records, without a run


@pytest.mark.parametrize(
    "axis",
    [
        "dataset.manifest=col/a/b/manifest.csv,col/a_b/manifest.csv",
        "name=a/b,a_b",
        "name=Fine,fine",
        "name='a ','a'",
        "name=a?b,a_b",
        "name='\\u0001','_'",
        r"name='a\\b',a_b",
        f"name={'a' * 300},{'a' * 299}",
        f"name={'a' * 248},{'b' * 260}",
        "name='\u00e9','e\u0301'",
        "name='~a','_a'",
        "name='..','.'",
    ],
)
def test_no_two_trials_have_one_folder(axis: str) -> None:
    """Names differ on every disk, whatever their case, Unicode form or length, and are the same each time."""
    names = list(trial.named(trial.jobs([axis])))
    assert list(trial.named(trial.jobs([axis]))) == names
    assert len({name.casefold() for name in names}) == len(names) >= 2
    for name in names:
        assert "/" not in name
        assert name.isprintable()
        assert len(name.encode()) <= 255


def test_no_folder_is_named_by_a_secret(tmp_path: Path) -> None:
    """Where an address with a password is swept, neither the trial's folder nor its claim shows the password."""
    swept = [f"tracking.uri='http://bob:canary{n}@one/'" for n in (1, 2)]
    names = [trial.folder_name([one]) for one in swept]
    assert len(set(names)) == 2
    assert "canary" not in "".join(names)
    trial.claim(tmp_path, swept[:1])
    assert "canary" not in "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    trial.claim(tmp_path, swept[:1])
    with pytest.raises(InputError, match="belongs to the trial"):
        trial.claim(tmp_path, swept[1:])


def test_plain_names_stay_as_they_were() -> None:
    """Plain overrides are names of folders, so that a restarted sweep finds its folders."""
    jobs = jobs_of(["inference.stride=16,32", "stain=none,macenko", "name='a b'"])
    strides_and_stains = [(stride, stain) for stride in (16, 32) for stain in ("none", "macenko")]
    assert list(jobs) == [f"inference.stride={stride},stain={stain}" for stride, stain in strides_and_stains]
    assert trial.folder_name(["name='a b'"]) == "name='a b'"
    assert trial.folder_name(["name=a/b"]) == trial.folder_name(["name=a/b"]) != trial.folder_name(["name=a_b"])


def test_all_trials_are_in_the_folder_of_their_sweep() -> None:
    """All trials have folders in one place, even where names or data sets are swept, by which runs are named."""
    for axis in ("name=a,b", "dataset.seed=1,2"):
        jobs = jobs_of([axis])
        assert len({command.compose_config(job, job=name).out.parent for name, job in jobs.items()}) == 1
    with pytest.raises(InputError, match="out is the folder of the whole sweep"):
        jobs_of(["out=runs/a,runs/b"])
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    with pytest.raises(InputError, match="wsiflow run -m experiment=search"):
        jobs_of(["experiment=search"])


def test_a_sweep_without_out_makes_no_other_folders(tmp_path: Path, monkeypatch, capsys) -> None:
    """Where every trial is refused, Hydra creates the sweep's folder, and nothing else is created."""
    monkeypatch.chdir(tmp_path)
    quick = ["dataset=single", "orchestrator=none", "tracking=off", "executor=inline", "seed=-1"]
    assert main(["run", "-m", "dataset.path=/absent/a/s.svs,/absent/b/s.svs", "name=one,two", *quick]) == 20
    assert capsys.readouterr().err.count("seed") == 4
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_a_folder_belongs_to_one_trial(tmp_path: Path) -> None:
    """Another trial with the same folder is refused, and the same trial may use it again."""
    trial.claim(tmp_path, ["name=a/b"])
    trial.claim(tmp_path, ["name=a/b"])
    with pytest.raises(InputError, match="belongs to the trial 'name=a/b', this one is 'name=a_b'"):
        trial.claim(tmp_path, ["name=a_b"])
    assert [path.name for path in (tmp_path / "receipts").iterdir()] == ["trial"]


def test_a_single_trial_is_named_by_its_settings(monkeypatch) -> None:
    """What decides no number does not name it, and one without settings has no name of its own."""
    monkeypatch.setenv("WSIFLOW_SWEEP", json.dumps({"alike": []}))
    overrides = ["dataset=manifest", "name=x", "inference.stride=112", "+model.maps=[a]", "executor=inline"]
    assert trial.name_of_job([], overrides) == "inference.stride=112,+model.maps=[a]"
    assert trial.name_of_job(["seed=1"], overrides) == "seed=1"
    assert trial.name_of_job([], ["dataset=manifest"]) == ""


def test_of_a_key_that_was_typed_twice_the_last_one_names_trials(monkeypatch) -> None:
    """A value that is swept names its trial though the same was given before for the whole sweep."""
    typed = ["seed=1", "inference.stride=112", "inference.stride=112,224"]
    monkeypatch.setenv("WSIFLOW_SWEEP", json.dumps({"alike": [], "overrides": typed}))
    assert trial.trial_name(["seed=1", "inference.stride=112"]) == "inference.stride=112"


def test_a_cpu_without_bfloat16_skips_trials_that_need_it(monkeypatch) -> None:
    """The trial is not started, unless other machines run it."""
    monkeypatch.setattr(sweeps, "cpu_supports_bf16", lambda: False)
    narrow = ["inference.precision=bf16", "executor.workers=1"]
    assert "no bfloat16" in sweeps.reason_to_skip(command.compose_config(narrow))
    assert not sweeps.reason_to_skip(command.compose_config([]))
    assert not sweeps.reason_to_skip(command.compose_config([*narrow, "executor=slurm_array"]))


def test_a_search_looks_at_score_and_cost(tiny_slides: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Optuna gets both of each trial, and finds the Pareto set of a comparison, which takes near costs as equal."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    monkeypatch.setattr(sweeps, "_planned", [])
    quick = over(tiny_slides, tmp_path / "found", "evaluation.bootstrap=0", "store=none")
    quick.remove("inference.stride=112")
    search = ["inference.stride=choice(112,224)", "inference.precision=fp32", "lesions.threshold=0.5"]
    search += ["hydra.sweeper.n_trials=2", "hydra.sweeper.sampler.seed=0"]
    assert main(["run", "-m", "experiment=search", *quick, *search]) == 0
    assert "trial 2 of 2: inference.stride=" in capsys.readouterr().out
    found = yaml.safe_load((tmp_path / "found/optimization_results.yaml").read_text())["solutions"]
    with (tmp_path / "found/compare.csv").open() as table:
        front = {row["stride"] for row in csv.DictReader(table) if row["pareto"] == "yes"}
    assert front
    assert front <= {str(one["params"]["inference.stride"]) for one in found}
    assert all(len(one["values"]) == 2 for one in found)


def test_a_search_is_told_all_core_hours(caplog) -> None:
    """Not those of the line, unless a former version began the trial, which is said."""
    two = OmegaConf.create({"direction": ["maximize", "minimize"]})
    metrics = {"froc.score": 0.5, "throughput.core_hours": 1.0}
    assert sweeps.objectives(metrics | {"cost.total_core_hours": 3.0}, two) == (0.5, 3.0)
    assert sweeps.objectives(metrics | {"cost.total_core_hours": float("nan")}, two) == (0.5, 1.0)
    assert "that of the line alone" in caplog.text


@pytest.fixture
def records(tmp_path: Path, monkeypatch) -> Path:
    """Return the folder of records of a sweep with three trials, to which this process belongs."""
    folder = tmp_path / ".trials/mine"
    shared = {"name": "s", "out": str(tmp_path), "folder": str(folder), "overrides": [], "alike": []}
    monkeypatch.setenv("WSIFLOW_SWEEP", json.dumps(shared))
    monkeypatch.setattr(sweeps, "_planned", ["a", "b", "c"])
    sweeps._create_records(folder)
    return folder


def test_a_trial_that_leaves_no_record_has_failed(records: Path) -> None:
    """A trial without a record, or with half of one, has failed: it was killed."""
    trial.record_end(0, Trial("a", 0))
    trial.record_end(1, Trial("b", 20))
    assert [(one.name, one.exit_code, one.reported) for one in sweeps._trials()] == [
        ("a", 0, True),
        ("b", 20, True),
        ("c", 30, False),
    ]
    (records / "0.json").write_text("[")
    assert sweeps.end()[0] == Trial("a", 30, reported=False)
    assert not records.parent.exists()
    assert "WSIFLOW_SWEEP" not in os.environ


def test_sweeps_in_one_folder_have_records_of_their_own(records: Path) -> None:
    """A sweep that starts removes the folders of sweeps that were killed, and none of a running one."""
    dead = records.parent / "dead"
    dead.mkdir()
    (dead / "lock").touch()
    other = records.parent / "other"
    sweeps._create_records(other)
    assert {path.name for path in records.parent.iterdir()} == {"mine", "other"}
    trial.record_end(0, Trial("a", 20))
    sweeps.end()
    assert other.exists()
