"""What Prefect's page shows of a run that has ended, as text; that it gets there is tested in test_flows."""

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image
from small_runs import over

from flows import artifacts, compose, pipeline, trial
from wsiflow.errors import Failure
from wsiflow.run.results.finish import Summary
from wsiflow.run.results.scores import read_metrics
from wsiflow.run.results.status import Status

DONE = Status("tumor_001", "done", "", 0, 10, 1, 5)
BROKEN = Status("broken", "rejected", "slide broken: it is no slide; copy it again", 20, 0, 0, 1)


def ended(root: Path, code: int, *statuses: Status) -> Summary:
    """Return the summary of a run in a folder."""
    metrics = {} if code == 20 else read_metrics(root / "evaluation/summary.json")
    return Summary(code, metrics, "report     here\nMLflow     http://127.0.0.1:5000/#/experiments/1", statuses)


def test_a_page_shows_scores_figures_and_the_worst_slides(finished: Path, small_slides: Path) -> None:
    """One text holds all: rounded scores, both curves and four overlays as pictures, and links."""
    config = compose.compose_config(over(small_slides, finished))
    text = artifacts._result(config, ended(finished, 0, DONE), [])
    assert text.startswith("# run\n\nComplete: 1 of 1 slides.")
    assert re.search(r"\| FROC score \(3 normal slides\) \| \d\.\d{3} \|", text)
    pictures = [base64.b64decode(one) for one in re.findall(r"data:image/jpeg;base64,([^)]+)\)", text)]
    assert [max(Image.open(io.BytesIO(one)).size) for one in pictures] == [420, 420, 200, 200, 200, 200]
    assert "<http://127.0.0.1:5000/#/experiments/1>" in text
    assert len(text) < 500_000


def test_worst_slides_are_those_furthest_from_their_truth() -> None:
    """Missed lesions count most, then scores on the wrong side."""
    row = {"label": "1", "score": "0.9", "n_lesions": "2", "n_found": "2"}
    rows = [row, row | {"n_found": "0"}, row | {"label": "0", "n_lesions": "0", "score": "0.4"}, row | {"score": "0.3"}]
    assert sorted(range(4), key=lambda place: -artifacts._error(rows[place])) == [1, 3, 2, 0]


def test_failures_are_a_table_of_causes_and_remedies(tmp_path: Path) -> None:
    """What is known in parts is shown in parts; a fault that only its line tells is shown whole."""
    lost = Status("lost", "failed", "its truth is gone; correct the path", 20, 1, 1, 1)
    known = Failure(20, "it is no slide", "copy it again", slide="broken", stage="ingest")
    rows = artifacts.failure_rows(tmp_path, ended(tmp_path, 20, DONE, BROKEN, lost), [known])
    assert [(row["slide"], row["stage"], row["cause"], row["remedy"]) for row in rows] == [
        ("broken", "ingest", "it is no slide", "copy it again"),
        ("lost", "", "its truth is gone; correct the path", ""),
    ]
    text = artifacts._failures([rows[0], rows[1] | {"cause": "no <slide> in *.tif"}] * 15)
    assert text.startswith(
        "* **broken**, ingest: it is no slide; *copy it again*\n* **lost**: no \\<slide> in \\*.tif\n"
    )
    assert text.endswith("* and 10 more, in `process_list.csv`")
    assert rows[0]["attempts"] == f"wsiflow explain {tmp_path} broken"


@pytest.mark.parametrize(
    ("code", "statuses", "state", "message"),
    [
        (0, [DONE], ("COMPLETED", "Completed"), "FROC "),
        (10, [DONE, BROKEN], ("COMPLETED", "Partial"), "1 of 2 slides failed: slide broken: it is no slide"),
        (20, [DONE, BROKEN], ("FAILED", "Failed"), "1 of 2 slides failed: slide broken: it is no slide"),
        (20, [BROKEN] * 5, ("FAILED", "Failed"), "5 of 5 slides failed: "),
    ],
)
def test_states_tell_how_a_run_ended(finished: Path, code: int, statuses: list[Status], state, message: str) -> None:
    """A partial run is complete by its type, so that what waits for failures does not take it for one."""
    shown = pipeline.state_of(ended(finished, code, *statuses))
    assert (shown.type.value, shown.name) == state
    assert str(shown.message).startswith(message)
    assert (" | and 2 more" in str(shown.message)) == (len(statuses) == 5)


def test_keys_are_those_of_a_folder(tmp_path: Path) -> None:
    """Runs of one name in two folders have keys of their own, of the characters that Prefect takes."""
    keys = {artifacts.key_of("Mein Lauf, ä=1", tmp_path / name, "result") for name in "ab"}
    assert len(keys) == 2
    assert all(re.fullmatch(r"wsiflow-mein-lauf-1-[0-9a-f]{8}-result", key) for key in keys)


def test_a_trial_is_shown_by_its_number_and_what_was_swept() -> None:
    """Groups of the configuration are left out, values are not touched."""
    assert trial.trial_title(2, 4, "inference.stride=56") == "trial 2 of 4: stride=56"
    assert trial.trial_title(1, 0, "a.b.c=0.5,stain=none,model.card=pkg:x.y.json") == (
        "trial 1: c=0.5,stain=none,card=pkg:x.y.json"
    )
