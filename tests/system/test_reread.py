"""Cached results are bound to the content of a file: the path may have another file later."""

import os
from pathlib import Path

import pytest

from wsiflow.model import card
from wsiflow.run.stages import network
from wsiflow.system.reread import cached_by_content


@pytest.fixture
def reads() -> list[str]:
    """Return the list of the paths that were read, in order."""
    return []


def test_a_file_is_read_once_while_it_stays_the_same(tmp_path: Path, reads: list[str]) -> None:
    """The file is also not read again if it is touched or replaced by an equal one."""
    path = tmp_path / "plan.json"
    path.write_text("one")

    @cached_by_content(files=2)
    def read(path: Path) -> str:
        reads.append(path.read_text())
        return reads[-1]

    assert read(path) == read(path) == "one"
    os.utime(path)
    path.unlink()
    path.write_text("one")
    assert read(path) == "one"
    assert reads == ["one"]


@pytest.mark.parametrize("how", ["rewritten", "replaced", "made anew"])
@pytest.mark.parametrize("age_s", [0, 3600])
def test_another_content_is_read_whatever_its_size_and_times(tmp_path: Path, how: str, age_s: int) -> None:
    """A file with the same path, size and times but other bytes is read again."""
    path = tmp_path / "cases.json"
    path.write_text("0.05")
    then = path.stat().st_mtime_ns - age_s * 10**9
    os.utime(path, ns=(then, then))
    read = cached_by_content(files=2)(Path.read_text)
    assert read(path) == "0.05"
    if how == "made anew":
        path.unlink()
    if how == "replaced":
        (tmp_path / "new").write_text("0.95")
        (tmp_path / "new").replace(path)
    else:
        path.write_text("0.95")
    os.utime(path, ns=(then, then))
    assert read(path) == "0.95"


def test_a_deleted_file_is_reported_by_its_reader(tmp_path: Path) -> None:
    """A cached result does not replace a missing file."""
    path = tmp_path / "plan.json"
    path.write_text("one")
    read = cached_by_content(files=2)(Path.read_text)
    assert read(path) == "one"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read(path)


PLAIN = {"trust_torchscript": False, "sha256": "", "positive_class": ""}


def test_a_model_that_is_replaced_under_its_path_is_loaded_again(tmp_path: Path) -> None:
    """The demo network and then that for lymph nodes are loaded from the path of the same card."""
    found = []
    for name in ("demo", "pcam"):
        source = card.card_path(card.ModelSpec(card=f"pkg:{name}.json", **PLAIN))
        text = source.read_text()
        weights = card.read_card(card.ModelSpec(card=source, **PLAIN)).weights
        (tmp_path / weights).write_bytes((source.parent / weights).read_bytes())
        (tmp_path / "mine.json").write_text(text)
        found.append(network.classifier_of(card.ModelSpec(card=tmp_path / "mine.json", **PLAIN)).identity)
    assert found[0] != found[1]
