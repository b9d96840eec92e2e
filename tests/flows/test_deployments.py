"""Deployments: forms of the configuration, a server that refuses what they do not allow, a worker that runs."""

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, get_args

import browser
import mlflow
import psutil
import pytest
import yaml
from prefect.workers.process import ProcessWorker
from serving import BIN, PrefectServer, end, receiving_mail
from swept import drawn, jobs_of, write_folder

from flows import artifacts, cli, forms
from flows.compose import compose_config, trials
from wsiflow.errors import InputError
from wsiflow.model.choice import InferenceParams
from wsiflow.run.config import RunConfig
from wsiflow.run.executor import jobs
from wsiflow.run.store_params import StoreParams

ROOT = Path(__file__).parents[2]
# An experiment is a list of overrides: it goes where a form takes those.
FILES = sorted(path for path in (ROOT / "conf").glob("*/*.yaml") if path.parent.name != "experiment")
GROUPS = {path.parent.name: sorted(one.stem for one in path.parent.glob("*.yaml")) for path in FILES}
CHOICES = {group: names for group, names in GROUPS.items() if len(names) > 1}
FORMS = (forms.Demo, forms.Run, forms.Sweep, forms.Evaluate, forms.Compare)
COARSE = ["dense.windows=4", "evaluation.bootstrap=0"]


def properties(form: type[forms.Form]) -> dict[str, Any]:
    """Return a form's fields by the key each one sets, those that are folded included."""
    shown = form.model_json_schema()["properties"]
    folded = {name: field for part in parts(form).values() for name, field in part.items()}
    fields = {name: field for name, field in shown.items() if name not in parts(form)} | folded
    return {field.get("title", name): field for name, field in fields.items()}


def parts(form: type[forms.Form]) -> dict[str, dict[str, Any]]:
    """Return the fields of every part of a form that the page shows folded."""
    shown = form.model_json_schema()["properties"]
    return {name: field["anyOf"][1]["properties"] for name, field in shown.items() if field.get("default") == {}}


# --- forms


@pytest.mark.parametrize("form", [forms.Run, forms.Sweep])
def test_every_file_of_the_configuration_can_be_chosen(form: type[forms.Form]) -> None:
    """A group of ``conf/`` that no form shows, or a file that is not among its choices, fails here."""
    shown = properties(form)
    offered = {group: shown[group].get("items", shown[group])["enum"] for group in CHOICES}
    assert offered == CHOICES


def test_bounds_and_choices_are_those_of_the_configuration() -> None:
    """Literals become the choices of a drop-down, bounds those of a number."""
    shown = properties(forms.Run)
    for key, literal in {
        "inference.precision": InferenceParams.model_fields["precision"].annotation,
        "inference.backend": InferenceParams.model_fields["backend"].annotation,
        "store.compression": StoreParams.model_fields["compression"].annotation,
    }.items():
        assert shown[key]["enum"] == list(get_args(literal))
    assert shown["inference.stride"]["enum"] == [one for one in range(1, 225) if 224 % one == 0]
    assert (shown["evaluation.bootstrap"]["minimum"], shown["evaluation.bootstrap"]["maximum"]) == (0, 100_000)
    assert shown["shard_slides"]["minimum"] == shown["executor.workers"]["anyOf"][0]["minimum"] == 0
    assert shown["dataset.limit"]["anyOf"][0]["minimum"] == 1
    assert properties(forms.Sweep)["inference.stride"]["items"]["enum"] == shown["inference.stride"]["enum"]
    assert properties(forms.Sweep)["repeat"]["items"] == {"type": "integer", "minimum": 1}
    assert shown["name"]["pattern"] == RunConfig.model_json_schema()["properties"]["name"]["pattern"]


@pytest.mark.parametrize("form", FORMS)
def test_every_field_is_described(form: type[forms.Form]) -> None:
    """No field of a form is a bare name, and the free overrides come last."""
    shown = form.model_json_schema()["properties"]
    for fields in (shown, *parts(form).values()):
        assert all(field["description"] for field in fields.values())
        assert [field["position"] for field in fields.values()] == list(range(len(fields)))
    assert list(shown)[-1] == "overrides"


@pytest.mark.parametrize("form", FORMS)
def test_a_form_begins_with_the_few_fields_that_most_runs_need(form: type[forms.Form]) -> None:
    """What else there is lies in parts, and a request may name it in its part or beside the others."""
    shown = form.model_json_schema()["properties"]
    assert len(shown.keys() - parts(form) - {"overrides"}) <= 9
    needed = dict.fromkeys(form.model_json_schema()["required"], "x")
    assert parts(form)
    for part, fields in parts(form).items():
        values = {name: field["default"] for name, field in fields.items()}
        assert form.model_validate({**needed, part: values}) == form.model_validate({**needed, **values})
    assert form.model_validate({**needed, **{part: {} for part in parts(form)}}) == form.model_validate(needed)


def test_an_untouched_form_is_the_command_without_arguments() -> None:
    """A form that nobody has filled in gives the values of ``conf/``."""
    assert compose_config(forms.Run(name="run").to_overrides()) == compose_config([])
    assert jobs_of(forms.Sweep(name="run").to_overrides()) == {"": forms.Sweep(name="run").to_overrides()}


GIVEN = {
    "dataset=manifest": {"manifest": "m.csv"},
    "dataset=folder": {"folder": "slides"},
    "dataset=synthetic": {"folder": "slides"},
    "dataset=single": {"path": "a.svs"},
    "model=card": {"card": "g.json"},
    "model=googlenet": {"card": "g.json"},
    "geometry=reference": {"tiles": "patch"},
}


TURNS = range(max(map(len, CHOICES.values())))


def chosen(turn: int) -> dict[str, str]:
    """Return a file of every group, with the values that these need; all turns together choose every file.

    Groups begin at different files, so that a geometry that asks for its own tiles does not always hide the same ones.
    """
    files = {group: names[(turn + place // 2) % len(names)] for place, (group, names) in enumerate(CHOICES.items())}
    needed = [GIVEN.get(f"{group}={name}", {}) for group, name in files.items()]
    return files | {field: value for values in needed for field, value in values.items()}


@pytest.mark.parametrize("turn", TURNS)
def test_a_choice_means_what_its_file_says(turn: int) -> None:
    """Files chosen in the form set every key as on the command line; only the stride is always the form's."""
    values = chosen(turn)
    keys = {field.title: values[name] for name, field in forms.Run.model_fields.items() if name in values}
    typed = ["name=a", "inference.stride=16", *(f"{key}={value}" for key, value in keys.items())]
    assert compose_config(forms.Run(name="a", **values).to_overrides()) == compose_config(typed)


def test_every_choice_has_its_turn() -> None:
    """The test above chooses each file of each group."""
    assert {group: sorted({chosen(turn)[group] for turn in TURNS}) for group in CHOICES} == CHOICES


@pytest.mark.parametrize(
    "text", ["null", "true", "1e3", "a b,c", "it's", "x=1", "[1]", "back\\", "\\'", "#1", "æ", "lab/a"]
)
def test_a_text_arrives_as_it_was_typed(text: str) -> None:
    """A text with characters that Hydra reads as syntax stays as it was typed."""
    config = compose_config(forms.Run(name=text, dataset="folder", folder=f"/slides/{text}").to_overrides())
    assert (config.name, config.dataset.folder) == (text, Path(f"/slides/{text}"))


def test_an_override_has_the_last_word() -> None:
    """An override replaces the field that sets the same key."""
    assert (
        compose_config(
            forms.Run(name="a", stride=16, overrides=["inference.stride=56"]).to_overrides()
        ).inference.stride
        == 56
    )


def test_what_cannot_go_together_is_refused_in_one_line() -> None:
    """A stride that does not divide the tile is refused where it is typed as an override."""
    with pytest.raises(InputError, match=r"inference\.stride is 30, it must divide tiles\.tile_px") as refused:
        compose_config(forms.Run(name="a", overrides=["inference.stride=30"]).to_overrides())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["..", "a/../../b", "/etc", "a//b", "a/", ".shared", " ", "a/ b"])
def test_a_name_does_not_lead_out_of_the_folder_of_runs(name: str) -> None:
    """The command line refuses what the form's pattern refuses, too."""
    assert not re.search(properties(forms.Run)["name"]["pattern"], name)
    with pytest.raises(InputError, match="name: neither a name nor a part of one") as refused:
        compose_config(forms.Run(name=name).to_overrides())
    assert "\n" not in str(refused.value)


def test_a_sweep_is_every_combination_of_its_lists() -> None:
    """Lists of the form and swept overrides are combined, and named as ``wsiflow run -m`` names them."""
    form = forms.Sweep(name="a", stride=[56, 112], stain=["none", "macenko"], overrides=["lesions.threshold=0.3,0.5"])
    jobs = jobs_of(form.to_overrides())
    assert len(jobs) == 8
    assert "inference.stride=112,stain=macenko,lesions.threshold=0.5" in jobs
    folder = compose_config(forms.Sweep(name="a").to_overrides()).out
    for job, overrides in jobs.items():
        assert compose_config(overrides, job=job).out.name == job
        assert compose_config(overrides, job=job).out.parent.parent == folder.parent
    assert len({compose_config(overrides, job=job).out.parent for job, overrides in jobs.items()}) == 1


def test_a_demo_of_another_size_draws_slides_of_its_own() -> None:
    """The slides of the usual demo are not those of another size, which would be refused in their folder."""
    usual, large = (compose_config(forms.Demo(name="a", size_px=size).to_overrides()) for size in (6144, 8192))
    assert usual.dataset == compose_config([]).dataset
    assert (large.dataset.folder.name, large.dataset.size_px) == ("data-8192", 8192)


def test_an_experiment_of_the_form_is_that_of_the_command_line() -> None:
    """Fields that are left as they are do not replace what the experiment says; those that are changed do."""
    form = forms.Sweep(name="a", experiment="stride_tradeoff", stain=["none", "macenko"], repeat=[1, 2])
    typed = ["experiment=stride_tradeoff", "name=a", "repeat=1,2", "stain=none,macenko"]
    assert list(trials(form.to_overrides())) == list(trials(typed))
    assert len(trials(typed)) == 6 * 2 * 2


def test_the_requests_of_the_document_can_be_sent() -> None:
    """Examples have names that are fields, and values that compose."""
    text = (ROOT / "docs/prefect.md").read_text()
    begins = [found.end() for found in re.finditer(r"[\"']request(=|\": )(?=\{)", text)]
    assert len(begins) == 2
    for begin in begins:
        request, _ = json.JSONDecoder().raw_decode(text, begin)
        assert compose_config(forms.Run.model_validate(request).to_overrides()).inference.stride == 56


# --- files for sites


def copied(recipe: Path) -> set[str]:
    """Return what a recipe copies to ``/src``."""
    lines = [line.split() for line in recipe.read_text().splitlines() if "/src" in line]
    return {name for line in lines if line[0] == "COPY" for name in line[1:-1]} | {
        line[0] for line in lines if len(line) == 2 and line[1] == f"/src/{line[0]}"
    }


@pytest.mark.parametrize("name", ["Dockerfile", "apptainer.def"])
def test_a_recipe_copies_what_the_package_is_built_of(name: str) -> None:
    """A recipe copies the files from which the test builds the wheel, and pins the versions of ``make``."""
    recipe = ROOT / "deployments" / name
    sources = {"wsiflow", "conf", "flows", "pyproject.toml", "README.md", "LICENSE", "NOTICE"}
    assert copied(recipe) == sources | {"constraints.txt"}
    torch = re.search(r"torch==[\d.]+", (ROOT / "Makefile").read_text())
    assert torch is not None
    assert torch[0] in recipe.read_text()
    assert "-c /src/constraints.txt" in recipe.read_text()


def test_the_settings_of_a_server_are_settings_of_prefect() -> None:
    """Every line of ``server.env`` is read by Prefect under that name."""
    lines = (ROOT / "deployments/server.env").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    help_text = subprocess.run(
        [BIN / "prefect", "config", "view", "--show-secrets"],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    ).stdout
    for name in settings.keys() - {"DO_NOT_TRACK"}:
        assert f"{name}=" in help_text.replace("\n", ""), name


# --- on a server


class Deployed(NamedTuple):
    """A server with every deployment of ``deployments/prefect.yaml``, called from `home`."""

    server: PrefectServer
    home: Path
    entries: dict[str, dict[str, Any]]

    def trigger(self, name: str, parameters: dict[str, Any]) -> tuple[int, Any]:
        """Ask for a run, as the form does."""
        return self.server.answer(f"deployments/{self.entries[name]['id']}/create_flow_run", {"parameters": parameters})

    def run(self, flow_run: str) -> dict[str, Any]:
        """Return a flow run."""
        return self.server.ask(f"flow_runs/{flow_run}")


def wait(what: Callable[[], bool]) -> None:
    over = time.monotonic() + 250  # a busy machine may take minutes
    while not what():
        assert time.monotonic() < over, "it did not happen in time"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def deployed(server: PrefectServer, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    home = tmp_path_factory.mktemp("deployed from here")
    pool = {"name": "wsiflow", "type": "process", "concurrency_limit": 4}
    pool["base_job_template"] = ProcessWorker.get_default_base_job_template()
    assert server.answer("work_pools/", pool)[0] == 201
    server.prefect("deploy", "--prefect-file", str(ROOT / "deployments/prefect.yaml"), "--all", cwd=home)
    entries = {entry["name"]: entry for entry in server.ask("deployments/filter", {})}
    return Deployed(server, home, entries | {"run": entries["my slides"]})


def test_there_is_an_entry_for_every_use(deployed: Deployed) -> None:
    """Each has a description and a limit, enforces its form and works where it was deployed; schedules are examples."""
    assert set(deployed.entries) == {"demo", "my slides", "run", "new slides weekly", "sweep", "evaluate", "compare"}
    for entry in deployed.entries.values():
        assert entry["enforce_parameter_schema"]
        assert entry["description"]
        assert "wsiflow" in entry["tags"]
        assert entry["global_concurrency_limit"]["limit"] >= 1
        assert entry["job_variables"]["env"]["DO_NOT_TRACK"] == "1"
        step = entry["pull_steps"][0]["prefect.deployments.steps.set_working_directory"]
        assert Path(step["directory"]) == deployed.home
    active = {schedule["active"] for entry in deployed.entries.values() for schedule in entry["schedules"]}
    assert active == {False}


def test_the_server_shows_the_form(deployed: Deployed) -> None:
    """Choices, bounds and descriptions reach the page that asks for them, in the order of the form."""
    for name, form in zip(("demo", "run", "sweep", "evaluate", "compare"), FORMS, strict=True):
        shown = deployed.entries[name]["parameter_openapi_schema"]["definitions"][form.__name__]
        assert shown["properties"] == form.model_json_schema()["properties"]
        assert shown["patternProperties"] == form.model_json_schema()["patternProperties"]
        assert shown["additionalProperties"] is False


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("run", {"name": "a", "stride": 30}),
        ("run", {"name": "a", "stride": "fine"}),
        ("run", {"name": "a", "workers": -1}),
        ("run", {"name": "a", "resources": {"workers": -1}}),
        ("run", {"name": "a", "shard_slides": -1}),
        ("run", {"name": "a", "scoring": {"bootstrap": 1_000_000}}),
        ("run", {"name": "a", "limit": 0}),
        ("run", {"name": "a", "executor": "airflow"}),
        ("run", {"name": "a", "network": {"precision": "fp8"}}),
        ("run", {"name": "a", "stain": "ink"}),
        ("run", {"name": "a", "out": "a/../../b"}),
        ("run", {"name": "a/../../b"}),
        ("run", {"name": ""}),
        ("run", {"name": "a", "colour": "red"}),
        ("run", {"name": "a", "pixels": {"colour": "red"}}),
        ("run", {"name": "a", "overrides": "stride=16"}),
        ("demo", {"name": "a", "size_px": 10}),
        ("sweep", {"name": "a", "stride": []}),
        ("sweep", {"name": "a", "stride": [16, 30]}),
        ("sweep", {"name": "a", "repeat": [0]}),
        ("sweep", {"name": "a", "experiment": "everything"}),
        ("sweep", {"name": "a", "stain": ["none", "ink"]}),
        ("evaluate", {"manifest": "m.csv", "detections": "d", "out": "../o"}),
        ("evaluate", {"manifest": "m.csv", "detections": "d", "out": "o", "mask_downsample": 0}),
    ],
)
def test_the_server_refuses_what_the_form_does_not_allow(deployed: Deployed, name: str, request_: dict) -> None:
    """The answer names the field, and no run is created."""
    before = deployed.server.ask("flow_runs/count", {})
    status, answer = deployed.trigger(name, {"request": request_})
    assert status == 409
    named, value = next(reversed(request_.items()))
    assert (next(iter(value)) if isinstance(value, dict) else named) in answer["detail"]
    assert deployed.server.ask("flow_runs/count", {}) == before


def test_the_server_refuses_a_run_without_a_form(deployed: Deployed) -> None:
    """Parameters that are no form are refused, and a run that nobody has named."""
    assert deployed.trigger("run", {"stride": 16})[0] == 409
    for parameters in ({}, {"request": {"stride": 16}}):
        status, answer = deployed.trigger("run", parameters)
        assert (status, "'name' is a required property" in answer["detail"]) == (409, True)
    assert deployed.trigger("sweep", {})[0] == 409


# --- in the browser


# Not with the mouse: messages lie over the button for some seconds, and what is loaded moves it.
SUBMIT = "[...document.querySelectorAll('button')].find(one => one.innerText == 'Submit').click()"
NAME = "document.getElementById([...document.querySelectorAll('label')].find(one => one.innerText == 'name')?.htmlFor)"


PICTURE = "[...document.images].some(one => one.src.startsWith('data:') && one.getBoundingClientRect().width > 100)"


class Pages(NamedTuple):
    """The pages of the server, and the tab to look at them."""

    deployed: Deployed
    tab: browser.Tab
    pictures: Path

    def open(self, page: str) -> browser.Tab:
        """Open a page of Prefect."""
        self.tab.open(f"{self.deployed.server.url.removesuffix('api')}v2/{page}")
        return self.tab

    def artifact(self, flow_run: str, kind: str) -> browser.Tab:
        """Open an artifact of a run."""
        own = {"flow_runs": {"id": {"any_": [flow_run]}}}
        shown = self.deployed.server.ask("artifacts/filter", own)
        (found,) = [one["id"] for one in shown if one["key"].endswith(f"-{kind}")]
        return self.open(f"artifacts/artifact/{found}")

    def choose(self, flow_run: str, item: str) -> None:
        """Choose from the menu of a run's page, and confirm."""
        self.open(f"runs/flow-run/{flow_run}")
        self.tab.click("[...document.querySelectorAll('button')].find(one => one.innerText == 'Open menu')")
        self.tab.click(f"[...document.querySelectorAll('[role=menuitem]')].find(one => one.innerText == '{item}')")
        self.tab.click("[...document.querySelectorAll('[role=dialog] button, [role=alertdialog] button')].at(-1)")

    def graph(self) -> float:
        """Return how much is drawn where the graph of a run is: its standard deviation, in grey levels."""
        x, y, w, h = self.tab.wait(
            "(() => { const found = document.querySelector('canvas'); if (!found) return null;"
            " const r = found.getBoundingClientRect(); return [r.x, r.y, r.width, r.height].map(Math.round) })()"
        )
        seen = self.tab.picture(self.pictures / "graph.png")
        return float(seen[y + 40 : y + h - 40, x : x + w].std())

    def keep(self, name: str) -> None:
        """Keep what is seen; docs/prefect.md shows it."""
        assert self.tab.keep(f"prefect-{name}.png", self.pictures).std() > 10


@pytest.fixture(scope="module")
def pages(deployed: Deployed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    if browser.CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    folder = tmp_path_factory.mktemp("pages")
    with browser.chromium(folder / "home") as tab:
        yield Pages(deployed, tab, folder / "pictures")


def test_the_page_of_a_form_starts_what_the_server_allows(pages: Pages) -> None:
    """Few fields are seen, parts open, a missing or wrong name is refused, and the right one starts a run."""
    entry = pages.deployed.entries["run"]["id"]
    own = {"flow_runs": {"deployment_id": {"any_": [entry]}}}
    tab = pages.open(f"deployments/deployment/{entry}/run")
    text = tab.wait_for("wsiflow run", "dataset.manifest", "Folder and machines")
    assert "store.compression" not in text
    pages.keep("form")
    tab.value(SUBMIT)
    tab.wait_for("'name' is a required property")
    tab.type("a/../../b", NAME)
    tab.value(SUBMIT)
    tab.wait_for("'a/../../b' does not match")
    tab.value(f"{NAME}.scrollIntoView()")
    pages.keep("refused")
    tab.value("[...document.querySelectorAll('[role=tab]')].find(one => one.innerText.trim() == 'change').focus()")
    tab.wait_for("dataset.path")
    assert pages.deployed.server.ask("flow_runs/count", own) == 0
    tab.type("typed", NAME)
    tab.value(SUBMIT)
    tab.wait("!document.body.innerText.includes('does not match')")  # the first time it takes the message away alone
    tab.value(SUBMIT)
    wait(lambda: pages.deployed.server.ask("flow_runs/count", own) == 1)
    (run,) = pages.deployed.server.ask("flow_runs/filter", own)
    assert forms.Run.model_validate(run["parameters"]["request"]) == forms.Run(name="typed", dataset="folder")
    pages.deployed.server.answer(f"flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLED"}, "force": True})


def test_a_schedule_that_the_page_switches_on_starts_what_its_entry_says(pages: Pages) -> None:
    """The parameters of the runs it creates are those of the entry."""
    entry = pages.deployed.entries["new slides weekly"]
    own = {"flow_runs": {"deployment_id": {"any_": [entry["id"]]}}}
    tab = pages.open(f"deployments/deployment/{entry['id']}")
    tab.wait_for("At 08:00 PM, only on Friday")
    switch = "[...document.querySelectorAll('[role=switch]')].at(-1)"
    tab.press(switch, f"{switch}.ariaChecked == 'true'")
    wait(lambda: pages.deployed.server.ask("flow_runs/count", own) > 0)
    pages.keep("schedule")
    for run in pages.deployed.server.ask("flow_runs/filter", own):
        assert run["parameters"] == entry["parameters"]
        assert run["parameters"]["request"]["name"] == "weekly"
    tab.press(switch, f"{switch}.ariaChecked == 'false'")
    wait(lambda: pages.deployed.server.ask("flow_runs/count", own) == 0)


class Worker(NamedTuple):
    """A worker that keeps running.

    Attributes:
        process: Its process.
        cancelled: File in which the commands of its Slurm, which has one array, 77, record what is cancelled.
    """

    process: psutil.Process
    cancelled: Path


@pytest.fixture(scope="module")
def worker(deployed: Deployed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    folder = tmp_path_factory.mktemp("slurm")
    cancelled = folder / "cancelled"
    for name, line in {"squeue": "echo '77_0|RUNNING|long'", "scancel": f'echo "$@" >> {cancelled}'}.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    env = deployed.server.env | {"PATH": f"{folder}:{deployed.server.env['PATH']}", "WSIFLOW_PROGRESS_S": "2"}
    command = [BIN / "prefect", "worker", "start", "--pool", "wsiflow"]
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield Worker(psutil.Process(process.pid), cancelled)
    finally:
        end(process)


class Finished(NamedTuple):
    """The runs that a worker without network completed, one for each form."""

    deployed: Deployed
    runs: dict[str, str]
    mails: list[str]
    whole: Path  # a slide that is cut off where the run `partial` reads it, without its suffix

    def artifacts(self, name: str) -> dict[str, str]:
        """Return what a run shows on its page, by the last word of each key."""
        own = {"flow_runs": {"id": {"any_": [self.runs[name]]}}}
        shown = self.deployed.server.ask("artifacts/filter", own)
        return {one["key"].rpartition("-")[2]: one["data"] for one in shown}

    def children(self, name: str) -> dict[str, str]:
        """Return names and states of a run's child runs."""
        own = {"flow_runs": {"parent_flow_run_id": {"any_": [self.runs[name]]}}}
        return {one["name"]: one["state_type"] for one in self.deployed.server.ask("flow_runs/filter", own)}


def detections(manifest: Path, folder: Path) -> Path:
    """Write a detection for every slide of a manifest."""
    folder.mkdir()
    with manifest.open(newline="") as stream:
        for i, row in enumerate(csv.DictReader(stream)):
            (folder / f"{row['slide_id']}.csv").write_text(f"0.{i + 1},{200 * i + 300},700\n")
    return folder


def scheduled(deployed: Deployed, request: dict[str, Any]) -> str:
    """Have the server schedule runs of an evaluation, bring the first one forward, and return its id."""
    daily = {"interval": 86_400, "anchor_date": (datetime.now(UTC) + timedelta(hours=1)).isoformat()}
    entry = deployed.entries["evaluate"]["id"]
    schedules = [{"active": True, "schedule": daily, "parameters": {"request": request}}]
    assert deployed.server.answer(f"deployments/{entry}/schedules", schedules)[0] == 201
    own = {"flow_runs": {"deployment_id": {"any_": [entry]}}, "sort": "EXPECTED_START_TIME_ASC"}

    def run_ids() -> list[str]:
        return [run["id"] for run in deployed.server.ask("flow_runs/filter", own) if run["auto_scheduled"]]

    wait(lambda: bool(run_ids()))
    first = run_ids()[0]
    now = {"type": "SCHEDULED", "state_details": {"scheduled_time": datetime.now(UTC).isoformat()}}
    assert deployed.server.answer(f"flow_runs/{first}/set_state", {"state": now, "force": True})[0] == 201
    return first


@pytest.fixture(scope="module")
def mails(deployed: Deployed) -> Iterator[list[str]]:
    """What the automations of ``deployments/automations.yaml`` mail."""
    (kind,) = deployed.server.ask("block_types/filter", {"block_types": {"name": {"like_": "Slack Webhook"}}})
    of_kind = {"block_schemas": {"block_type_id": {"any_": [kind["id"]]}}}
    (schema,) = deployed.server.ask("block_schemas/filter", of_kind)
    with receiving_mail() as server:
        block = {"name": "wsiflow-mail", "data": {"url": server.address}}
        ids = {"block_type_id": kind["id"], "block_schema_id": schema["id"]}
        status, block = deployed.server.answer("block_documents/", block | ids)
        assert status == 201, block
        text = (ROOT / "deployments/automations.yaml").read_text().replace("BLOCK", block["id"])
        for automation in yaml.safe_load(text)["automations"]:
            assert deployed.server.answer("automations/", automation)[0] == 201
        yield server.mails


@pytest.fixture(scope="module")
def finished(deployed: Deployed, worker: Worker, mails: list[str], tiny_slides: Path, small_slides: Path) -> Finished:
    common = {"dataset": "manifest", "manifest": str(tiny_slides), "executor": "inline", "overrides": COARSE}
    folder = detections(small_slides, deployed.home / "detections")
    for name, skill in {"good": 0.9, "bad": 0.3}.items():
        write_folder(deployed.home / "two" / name, drawn(skill, n_slides=6), core_hours=skill)
    trials_of_sweep = [*COARSE, "inference.stride=30,112,224"]  # the form itself offers no stride of 30
    copied = Path(shutil.copytree(tiny_slides.parent, deployed.home / "copied"))
    whole = (copied / "b.tif").rename(copied / "b")
    (copied / "b.tif").write_bytes(whole.read_bytes()[:9000])
    broken = {"manifest": str(copied / "manifest.csv"), "allow_partial": True, "tracking": "off"}
    requests = {
        "run": {**common, "name": "one", "stride": 224, "tracking": "off"},
        "sweep": {**common, "name": "many", "store": ["none"], "overrides": trials_of_sweep},
        "compare": {"folders": ["two"], "out": "compared", "reference": "run=bad"},
    }
    weekly = {"manifest": str(small_slides), "detections": str(folder), "out": "weekly", "bootstrap": 20}
    runs = {"evaluate": scheduled(deployed, weekly)}
    for name, request in requests.items():
        status, answer = deployed.trigger(name, {"request": request})
        assert status == 201, answer
        runs[name] = answer["id"]
    wait(lambda: all(deployed.run(one)["end_time"] for one in runs.values()))
    # By itself: a server that is too busy may refuse a worker that submits one more.
    status, answer = deployed.trigger("run", {"request": {**common, **broken, "name": "partial", "stride": 224}})
    assert status == 201, answer
    runs["partial"] = answer["id"]
    wait(lambda: deployed.run(runs["partial"])["end_time"])
    return Finished(deployed, runs, mails, whole)


def test_a_worker_completes_what_the_form_says(finished: Finished) -> None:
    """The run has the form's name and lies below the directory of the deployment, its numbers on its page."""
    run = finished.deployed.run(finished.runs["run"])
    assert (run["name"], run["state_type"]) == ("one", "COMPLETED")
    out = finished.deployed.home / "runs/one"
    summary = json.loads((out / "evaluation/summary.json").read_text())
    shown = finished.artifacts("run")["result"]
    assert f"| Slide AUC | {summary['roc.auc']:.3f} |" in shown
    assert f"AUC {summary['roc.auc']:.3f}" in run["state"]["message"]
    assert f"Folder: `{out}`" in shown
    assert (out / "report.html").exists()
    assert finished.children("run") == {}, "a run is listed once"
    records = finished.deployed.server.ask("logs/filter", {"logs": {"flow_run_id": {"any_": [run["id"]]}}})
    assert "plan: 2 slides, 0 rejected" in str([record["message"] for record in records])


def test_a_sweep_goes_on_after_a_trial_that_fails(finished: Finished) -> None:
    """The good trial is a child run with a folder, and a record under the sweep's; the bad one is named."""
    run = finished.deployed.run(finished.runs["sweep"])
    assert run["state_type"] == "FAILED"
    assert run["state"]["message"].startswith("1 of 3 trials failed: inference.stride=30: ")
    assert "must divide tiles.tile_px" in run["state"]["message"]
    assert finished.children("sweep") == {
        "trial 1 of 3: stride=30": "FAILED",
        "trial 2 of 3: stride=112": "COMPLETED",
        "trial 3 of 3: stride=224": "COMPLETED",
    }
    assert (finished.deployed.home / "runs/many/inference.stride=224/evaluation/summary.json").exists()
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{finished.deployed.home}/runs/mlflow.db")
    records = client.search_runs([client.get_experiment_by_name("wsiflow").experiment_id])
    (parent,) = [one for one in records if one.data.tags["wsiflow.role"] == "sweep"]
    children = [one for one in records if one.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert (parent.info.run_name, len(children)) == ("many", 2)
    shown = finished.artifacts("sweep")
    assert "2 of 3 trials have scores" in shown["sweep"]
    assert "| inference.stride=30 | failed (20) |" in shown["sweep"]
    assert "| inference.stride=224 | complete | " in shown["sweep"]
    assert [row["Setting"] for row in json.loads(shown["table"])] == ["stride=112", "stride=224"]


def test_a_mail_says_that_a_run_failed(finished: Finished) -> None:
    """It has the reason; runs without a fault and the trials of a sweep send none. Prefect may send one twice."""
    failed, partial = "Subject: sweep: many is Failed", "Subject: my slides: partial is Partial"
    wait(lambda: any(failed in mail for mail in finished.mails))
    sent = {line for mail in finished.mails for line in mail.splitlines() if line.startswith("Subject:")}
    assert sent <= {failed, partial}
    mail = next(mail for mail in finished.mails if failed in mail)
    assert "1 of 3 trials failed: inference.stride=3D30" in mail.replace("=\r\n", "")


def test_the_page_of_a_run_shows_what_came_of_it(pages: Pages, finished: Finished) -> None:
    """Name, state, tags and the link to its entry; its scores and figures are under Artifacts."""
    tab = pages.open(f"runs/flow-run/{finished.runs['run']}?tab=Artifacts")
    tab.wait_for("one", "Completed", "wsiflow", "my slides", "result")
    pages.artifact(finished.runs["run"], "result")
    tab.wait(PICTURE)
    tab.wait_for("Slide AUC", "Folder:")
    pages.keep("result")


def test_the_page_of_a_sweep_leads_to_its_comparison(pages: Pages, finished: Finished) -> None:
    """Its trials are child runs, named by what was swept; table and figures of the comparison are an artifact."""
    tab = pages.open(f"runs/flow-run/{finished.runs['sweep']}?tab=Artifacts")
    tab.wait_for("many", "Failed", "sweep: many", "comparison")
    pages.open(f"runs/flow-run/{finished.runs['sweep']}?tab=SubflowRuns")
    tab.wait_for("trial 1 of 3: stride=30", "trial 2 of 3: stride=112", "trial 3 of 3: stride=224")
    pages.artifact(finished.runs["sweep"], "comparison")
    tab.wait(PICTURE)
    tab.wait_for("Against the reference", "stride=112", "stride=224", "Pareto set, cheapest first")
    pages.keep("comparison")


def test_the_page_of_a_partial_run_says_what_failed_and_retry_completes_it(pages: Pages, finished: Finished) -> None:
    """The graph shows the steps, and the table what failed and why; once the slide is whole, Retry does the rest."""
    run, tab = finished.runs["partial"], pages.tab
    assert finished.deployed.run(run)["state"]["message"].startswith("1 of 2 slides failed: slide b, ingest, ")
    pages.open(f"runs/flow-run/{run}")
    tab.wait_for("partial", "Partial", "model: demo", "Task Runs")
    wait(lambda: pages.graph() > 10)
    pages.keep("partial")
    pages.artifact(run, "failures")
    tab.wait_for("b.tif")
    finished.whole.replace(finished.whole.with_suffix(".tif"))
    pages.choose(run, "Retry")
    wait(lambda: finished.deployed.run(run)["state_name"] == "Completed")
    assert finished.deployed.run(run)["run_count"] == 2
    assert (finished.deployed.home / "runs/partial/heatmaps/b.tif").exists()


def test_runs_are_compared_from_a_form(finished: Finished) -> None:
    """The files lie where the form says, the table is on the page, and the reference is the requested one."""
    assert finished.deployed.run(finished.runs["compare"])["state_type"] == "COMPLETED"
    shown = finished.artifacts("compare")
    assert [row["Setting"] for row in json.loads(shown["table"])] == ["run=bad", "run=good"]
    text = (finished.deployed.home / "compared/compare.md").read_text()
    assert "Differences of" in text
    assert "to run=bad" in text


def test_a_scheduled_evaluation_gives_what_the_command_gives(
    finished: Finished, small_slides: Path, tmp_path: Path
) -> None:
    """The server's scheduler creates the run, and a worker writes the same files as the command, byte for byte."""
    run = finished.deployed.run(finished.runs["evaluate"])
    assert (run["auto_scheduled"], run["state_type"]) == (True, "COMPLETED")
    folder = finished.deployed.home / "detections"
    command = ["evaluate", "--manifest", str(small_slides), "--detections", str(folder), "--bootstrap", "20"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.glob("*.*") if path.is_file()}
    assert names >= {"summary.json", "cases.csv", "froc.json", "roc.json"}
    for name in names:
        assert (finished.deployed.home / "weekly" / name).read_bytes() == (tmp_path / name).read_bytes()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert f"| Slide AUC | {summary['roc.auc']:.3f} |" in finished.artifacts("evaluate")["result"]


def submitted(root: Path) -> None:
    """Write what a driver that was killed after it had submitted array 77 to Slurm leaves on the disk."""
    dialect = compose_config(["executor=slurm_array"]).executor.array.dialect.model_dump(mode="json")
    log = jobs.JobLog(root)
    log.append("driver", host=socket.gethostname(), pid=2**22 + 1, born="never", dialect=dialect)
    log.append("job", name="long", job="77")


def test_a_cancelled_run_leaves_nothing_behind(pages: Pages, worker: Worker, small_slides: Path) -> None:
    """Its page says how far it is and cancels it: its processes end, and so do the array jobs of its folder."""
    deployed = pages.deployed
    slow = ["inference=window", "dense.windows=0", "tiles.group_tiles=2"]
    request = {"name": "long", "dataset": "manifest", "manifest": str(small_slides), "tracking": "off", "workers": 1}
    status, run = deployed.trigger("run", {"request": {**request, "stride": 8, "overrides": slow}})
    assert status == 201
    root = deployed.home / "runs/long"
    wait(lambda: any((root / "patches").glob("*.h5")))
    processes = worker.process.children(recursive=True)
    assert len(processes) >= 2, "a flow and its worker"
    submitted(root)
    pages.open(f"runs/flow-run/{run['id']}?tab=Artifacts")
    pages.tab.wait_for("long", "Running", "progress", "of 6 slides", " tiles")
    pages.keep("progress")
    pages.choose(run["id"], "Cancel")
    wait(lambda: deployed.run(run["id"])["state_type"] == "CANCELLED")
    assert psutil.wait_procs(processes, timeout=60)[1] == []
    assert worker.cancelled.read_text().split() == ["77"]
    own = {"logs": {"flow_run_id": {"any_": [run["id"]]}}}
    wait(lambda: any("77 was cancelled" in log["message"] for log in deployed.server.ask("logs/filter", own)))


def test_a_server_shows_a_comparison(server: PrefectServer, tmp_path: Path) -> None:
    """With a server the command ``wsiflow compare`` leaves a flow run with table and text as artifacts."""
    trials = (("x", 0.9, 2.0), ("y", 0.3, 1.0))
    folders = [
        str(write_folder(tmp_path / name, drawn(skill, n_slides=6), core_hours=cost)) for name, skill, cost in trials
    ]
    command = [BIN / "wsiflow", "compare", *folders, "--out", str(tmp_path / "out"), "--bootstrap", "50"]
    subprocess.run(command, env=server.env, check=True, capture_output=True)
    table = server.ask(f"artifacts/{artifacts.key_of('out', tmp_path / 'out', 'comparison-table')}/latest")
    assert [row["Pareto"] for row in json.loads(table["data"])] == ["yes [100 %]", "yes [100 %]"]
    text = server.ask(f"artifacts/{artifacts.key_of('out', tmp_path / 'out', 'comparison')}/latest")
    assert "| run=x | 1.000" in text["data"]
    assert text["data"].count("](data:image/") == 3, "the figures are pictures"
    assert server.ask(f"flow_runs/{text['flow_run_id']}")["state_type"] == "COMPLETED"
