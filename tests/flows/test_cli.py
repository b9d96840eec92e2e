"""The commands on files, as a user types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving import BIN
from small_runs import over
from worked_examples import A_ITC, E1, E2, E3, e1_masks, e3_truth

from flows import commands
from flows.__main__ import main
from flows.commands import COMMANDS, Command

SCORES = {
    "E1": (E1, lambda folder: e1_masks(folder, A_ITC), ["--downsample", "1", "--um-px", "25"], 0.888889),
    "E2": (E2, e1_masks, ["--downsample", "1", "--um-px", "25"], 0.666667),
    "E3": (E3, lambda folder: {"Tumor_T": e3_truth("xml", folder)}, ["--um-px", "0.243"], 0.770833),
}


@pytest.mark.parametrize("example", SCORES)
def test_evaluate_scores_the_worked_examples(tmp_path: Path, capsys, example: str) -> None:
    """``wsiflow evaluate`` on detections, a manifest and truth files gives E1, E2 and E3 to the last digit."""
    detections, truth, options, expected = SCORES[example]
    lines = ["slide_id,path,label,mask_path,annotation_path"]
    (tmp_path / "detections").mkdir()
    for slide_id, text in detections.items():
        (tmp_path / "detections" / f"{slide_id}.csv").write_text(text)
        path = truth(tmp_path).get(slide_id)
        columns = {".xml": f",{path and path.name}", ".png": f"{path and path.name},"}.get(
            path.suffix if path else "", ","
        )
        lines.append(f"{slide_id},{slide_id}.tif,{'tumor' if slide_id.startswith('Tumor') else 'normal'},{columns}")
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("\n".join(lines) + "\n")
    out = tmp_path / "scores"
    arguments = ["--manifest", str(manifest), "--detections", str(tmp_path / "detections"), "--out", str(out)]
    assert main(["evaluate", *arguments, *options, "--bootstrap", "20"]) == 0
    assert f"froc.score {expected:.6f}" in capsys.readouterr().out
    assert round(json.loads((out / "summary.json").read_text())["froc.score"], 6) == expected
    assert (out / "cases.csv").exists()


def test_a_missing_detections_file_is_bad_input(tmp_path: Path, capsys) -> None:
    """The message names the slide that has no file, and the exit code is 20."""
    (tmp_path / "detections").mkdir()
    (tmp_path / "manifest.csv").write_text("slide_id,path,label\na,a.tif,normal\n")
    arguments = ["--manifest", str(tmp_path / "manifest.csv"), "--detections", str(tmp_path / "detections")]
    assert main(["evaluate", *arguments, "--out", str(tmp_path / "o")]) == 20
    assert "no detection file for a" in capsys.readouterr().err


def test_evaluate_follows_a_named_protocol(tmp_path: Path, capsys) -> None:
    """``--protocol camelyon16`` leaves its slides out; options replace single rules; an unknown name is bad input."""
    (tmp_path / "detections").mkdir()
    for name in ("normal_001", "Normal_086"):
        (tmp_path / "detections" / f"{name}.csv").write_text("")
    (tmp_path / "manifest.csv").write_text("slide_id,path,label\nnormal_001,a.tif,normal\nNormal_086,b.tif,normal\n")
    arguments = ["evaluate", "--manifest", str(tmp_path / "manifest.csv"), "--detections", str(tmp_path / "detections")]
    scored = {}
    for name, options in {"own_spacing": [], "camelyon16": [], "changed": ["--downsample", "16"]}.items():
        protocol = "camelyon16" if name == "changed" else name
        out = tmp_path / name
        assert main([*arguments, "--out", str(out), "--protocol", protocol, "--bootstrap", "5", *options]) == 0
        matches = json.loads((out / "matches.json").read_text())
        assert f"protocol {protocol} {matches['protocol_hash'][:12]}" in capsys.readouterr().out
        scored[name] = (matches["protocol_hash"], json.loads((out / "summary.json").read_text())["froc.n_slides"])
    assert [n for _, n in scored.values()] == [2, 1, 1]
    assert len({digest for digest, _ in scored.values()}) == 3
    assert main([*arguments, "--out", str(tmp_path / "o"), "--protocol", "cam"]) == 20
    assert "use one of camelyon16, own_spacing" in capsys.readouterr().err


def test_commands_on_a_folder_without_a_run_say_so(tmp_path: Path, capsys) -> None:
    """Status and verify say that the folder holds no run, and what to name instead."""
    assert main(["status", str(tmp_path)]) == 20
    assert main(["verify", str(tmp_path)]) == 20
    assert capsys.readouterr().err.count("name the out= folder of a run") == 2


HELLO = """
from flows.terminal import say

def add_options(parser):
    parser.add_argument("who")

def main(arguments):
    say(f"hello {arguments.who}")
    return 10
"""


def test_a_command_is_a_file_and_a_line_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new command is in the help, has a help of its own, and is imported only when it is typed."""
    (tmp_path / "say_hello.py").write_text(HELLO)
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    monkeypatch.setitem(COMMANDS, "say-hello", Command("say-hello", "greet somebody"))
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "    say-hello   greet somebody" in capsys.readouterr().out
    assert "flows.commands.say_hello" not in sys.modules
    assert main(["say-hello", "you"]) == 10
    assert capsys.readouterr().out == "hello you\n"
    with pytest.raises(SystemExit):
        main(["say-hello", "--help"])
    assert capsys.readouterr().out.startswith("usage: wsiflow say-hello [-h] who\n\ngreet somebody")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_has_its_file(name: str) -> None:
    """The file of each command can be imported, and has the two functions that are called."""
    module = COMMANDS[name].load()
    assert callable(module.add_options)
    assert callable(module.main)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["dotcor"], "argument COMMAND: invalid choice: 'dotcor' (choose from 'run', 'evaluate'"),
        (["--shout", "doctor"], "wsiflow: error: unrecognized arguments: --shout"),
        (["doctor", "--shout"], "wsiflow doctor: error: unrecognized arguments: --shout"),
    ],
)
def test_what_is_typed_wrong_is_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the wrong word before anything is done."""
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert message in capsys.readouterr().err


def test_no_command_waits_for_the_modules_of_another() -> None:
    """A command imports no other one, and no heavy library: array jobs start one for each of their elements."""
    code = "import sys\nfrom wsiflow.flows import __main__, commands\ncommands.COMMANDS['element'].load()\n"
    code += "heavy = {'numpy', 'pydantic', 'hydra', 'prefect'} & sys.modules.keys()\n"
    code += "print(*heavy, *(name for name in sys.modules if name.startswith('wsiflow.flows.commands.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["wsiflow.flows.commands.element"]


def test_bash_completes_commands_keys_values_and_files(tmp_path: Path, capsys) -> None:
    """A real bash gets its words from the script alone, without starting wsiflow."""
    assert main(["completion", "bash"]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    (tmp_path / "slides.csv").touch()
    lines = {
        "wsiflow ver": "verify",
        "wsiflow run inference.prec": "inference.precision=",
        "wsiflow run inference.precision=b": "bf16",
        "wsiflow run executor=sl": "slurm_array",
        "wsiflow plan allow_partial=": "true false",
        "wsiflow run dataset.manifest=sl": "slides.csv",
        "wsiflow compare --ref": "--reference",
        "wsiflow status sl": "slides.csv",
    }
    script = "source completion; compopt() { :; }; while read -r COMP_LINE; do "
    script += 'COMP_POINT=${#COMP_LINE}; _wsiflow; echo "${COMPREPLY[@]}"; done'
    typed = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(["bash", "-c", script], input=typed, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout.splitlines(), done.stderr) == (list(lines.values()), "")


def without_a_reader(*arguments: str) -> tuple[int, str]:
    """Return exit code and errors of a command whose output nobody reads, as behind ``| head`` that has ended."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([BIN / "wsiflow", *arguments], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", [["doctor"], ["--help"], ["run", "--cfg", "job"], ["run", "--hydra-help"]])
def test_a_closed_pipe_is_no_fault(arguments: list[str]) -> None:
    """Neither the command nor the interpreter prints an error about it."""
    assert without_a_reader(*arguments) == (0, "")


def test_a_run_goes_on_without_a_reader(tiny_slides: Path, tmp_path: Path) -> None:
    """The run publishes all its files, and ends with its own exit code."""
    assert without_a_reader("run", *over(tiny_slides, tmp_path / "run")) == (0, "")
    assert (tmp_path / "run/evaluation/summary.json").exists()
    assert (tmp_path / "run/report.html").exists()


def test_output_that_cannot_be_written_is_told_once() -> None:
    """A full disk behind standard output gives one sentence, and the command succeeds."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([BIN / "wsiflow", "doctor"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert "standard output cannot be written: No space left on device" in done.stderr


def test_names_of_files_are_utf8_whatever_the_locale_says(tmp_path: Path) -> None:
    """A command reads them in the encoding in which receipts hold them."""
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "wsiflow.flows", "status", "Schöß"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, check=False)
    assert "Schöß" in done.stderr.decode("utf-8")
    assert done.returncode == 20


def test_streams_that_were_closed_before_lead_nowhere(tmp_path: Path) -> None:
    """A file that is opened does not get the number of a closed stream, and printing does not fail."""
    code = "import sys; from wsiflow.flows.__main__ import open_closed_streams; open_closed_streams()\n"
    code += "with open(sys.argv[1], 'w') as file: file.write(str(file.fileno())); print('told', flush=True)"
    kept = tmp_path / "kept"
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code, str(kept)]
    assert subprocess.run(command, check=False).returncode == 0
    assert int(kept.read_text()) > 2
