"""What is logged, where it is shown, and what no record may hold."""

import logging
import os
from pathlib import Path

import pytest
from small_runs import over

from flows import __main__ as command
from flows import logs
from wsiflow.errors import InputError

STEPS = logging.getLogger("wsiflow.run.shards")


def say_everything() -> None:
    logs.note("a note")
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        STEPS.log(level, "a record of %s", logging.getLevelName(level))


@pytest.mark.parametrize(
    ("typed", "output", "errors"),
    [
        ([], "a note\n", ["WARNING", "ERROR"]),
        (["-q"], "", ["ERROR"]),
        (["-v"], "a note\n", ["INFO", "WARNING", "ERROR"]),
        (["-v", "-q", "-v", "--verbose"], "a note\n", ["DEBUG", "INFO", "WARNING", "ERROR"]),
        (["-vv"], "a note\n", ["DEBUG", "INFO", "WARNING", "ERROR"]),
    ],
)
def test_options_say_how_much_is_shown(typed: list[str], output: str, errors: list[str], capsys) -> None:
    """Notes go to standard output and nothing else does; children and trials find the level in the environment."""
    others, level = logs.without_options(["run", *typed, "out=x", "--", "-v"])
    assert others == ["run", "out=x", "--", "-v"]
    with logs.shown(level), logs.shown():
        assert os.environ.get(logs.VARIABLE, "") == level
        say_everything()
    captured = capsys.readouterr()
    assert captured.out == output
    assert [line.rpartition(" ")[2] for line in captured.err.splitlines()] == errors
    assert logs.VARIABLE not in os.environ
    say_everything()
    assert capsys.readouterr().out == ""


def test_no_record_holds_a_secret(capsys) -> None:
    """Secrets are removed from every record, whatever logger and argument it has."""
    with logs.shown("INFO"):
        STEPS.warning("no answer from %s", "https://joe:canary@host/?token=canary")
        logs.note("password=canary")
    captured = capsys.readouterr()
    assert "canary" not in captured.out + captured.err
    assert "no answer from https://[redacted]@host/?token=[redacted]" in captured.err


def test_a_level_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is one line that names the levels."""
    monkeypatch.setenv(logs.VARIABLE, "loud")
    with pytest.raises(InputError, match="WSIFLOW_LOG_LEVEL is 'LOUD'; set it to one of DEBUG, INFO"), logs.shown():
        pass


def test_a_run_says_each_thing_once(tiny_slides: Path, tmp_path: Path, capsys) -> None:
    """Steps are shown with -v, rejected slides on standard output, and with -q the result alone."""
    manifest = tmp_path / "manifest.csv"
    lines = tiny_slides.read_text().splitlines()
    slides = [line.replace(",", f",{tiny_slides.parent}/", 1).replace("a.xml", "") for line in lines[1:]]
    (tmp_path / "broken.tif").write_text("no slide")
    manifest.write_text("\n".join([lines[0], *slides, f"broken,{tmp_path}/broken.tif,normal,"]) + "\n")
    run = ["run", *over(manifest, tmp_path / "run", "allow_partial=true", "dense.windows=0")]
    assert command.main([*run, "-v"]) == 10
    captured = capsys.readouterr()
    rejected = [line for line in captured.out.splitlines() if line.startswith("rejected: slide broken")]
    assert len(rejected) == 1
    assert "not a slide" not in captured.err
    for step in ("3 slides to test", "plan: 2 slides, 1 rejected", "done a: 1 of 1 slides are finished"):
        assert step in captured.err
    assert command.main([*run, "-q"]) == 10
    quiet = capsys.readouterr()
    assert quiet.out.startswith("PARTIAL: broken is missing")
    assert "rejected" not in quiet.out
    assert quiet.err == ""
