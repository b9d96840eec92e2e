"""A slide that is modified while it is read is detected, and nothing is published from it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows import compose
from wsiflow.errors import InputError, SlideModified
from wsiflow.run import cases, shards
from wsiflow.run.executor.protocol import Outcome
from wsiflow.run.plan import read_plan
from wsiflow.run.stages import ingest, work
from wsiflow.run.stages.line import STAGES
from wsiflow.slides import content, slide
from wsiflow.system import publish

FAST = ["orchestrator=none", "tracking=off", "executor=inline", "inference.stride=56", "dense.windows=8"]
#: Stages that read slides, for runs that store pixels and for those that do not.
READERS = {"hdf5": ("ingest", "stain", "extract", "detect"), "none": ("predict", "certify")}


def rewrite(path: Path) -> None:
    """Write other bytes to a file, then restore its content and times, as a copying tool might do."""
    data, before = path.read_bytes(), path.stat()
    stamped = content.stamp(path)
    while content.stamp(path) == stamped:  # times may have a resolution of some milliseconds
        path.write_bytes(bytes(len(data)))
        path.write_bytes(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@contextmanager
def disturbed(path: Path, monkeypatch: pytest.MonkeyPatch, *, times: int) -> Iterator[None]:
    """Modify a slide during each of the first reads, so that these return the temporary content."""
    left = [times]

    def reading(read: Callable[..., Any]) -> Callable[..., Any]:
        def zeros(*arguments: Any, **more: Any) -> Any:
            found = read(*arguments, **more)
            if not left[0]:
                return found
            left[0] -= 1
            rewrite(path)
            blank = np.zeros_like(found if isinstance(found, np.ndarray) else found.rgb)
            return blank if isinstance(found, np.ndarray) else found._replace(rgb=blank)

        return zeros

    with monkeypatch.context() as patched:
        for name in ("read_scaled", "overview"):
            patched.setattr(slide.Slide, name, reading(getattr(slide.Slide, name)))
        yield
    assert left[0] < times, "something was read"


class Line:
    """A run over one slide, task by task."""

    def __init__(self, manifest: Path, out: Path, store: str) -> None:
        given = ["dataset=manifest", f"dataset.manifest={manifest}", "dataset.limit=1", f"store={store}"]
        self.config = compose.compose_config([f"out={out}", *FAST, *given, "stain=macenko", "stain.on_failure=raw"])
        self.source = shards.begin(self.config)
        assert work.run_task(self.source, "choose", 0).receipt
        self.outcomes: list[Outcome] = []

    def tasks(self) -> Iterator[tuple[str, int]]:
        """Yield every task; the plan is written after the first has ended."""
        yield "ingest", 0
        self.source = ingest.make_plan(self.source, self.outcomes)
        made = read_plan(self.source)
        for stage in STAGES.values():
            if stage.is_due(made, 0):
                yield from ((stage.name, index) for index in stage.tasks_of(made, 0))

    def do(self, stage: str, index: int) -> Outcome:
        outcome = work.run_task(self.source, stage, index)
        self.outcomes.append(outcome)
        return outcome


@pytest.mark.parametrize("store", ["hdf5", "none"])
def test_what_was_read_of_a_slide_that_was_written_is_never_published(
    tiny_slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    """After a modification the task is repeated once, then fails; when the writer has ended it succeeds."""
    calm, disturb = (Line(tiny_slides, tmp_path / name, store) for name in ("calm", "disturbed"))
    path = cases.read_cases(calm.source)[1][0].path
    for task in calm.tasks():
        assert calm.do(*task).receipt
    seen = []
    for stage, index in disturb.tasks():
        if stage in READERS[store]:
            seen.append(stage)
            there = set((tmp_path / "disturbed/receipts").rglob("*.json"))
            with disturbed(path, monkeypatch, times=1000):
                failed = work.run_task(disturb.source, stage, index)
            assert failed.receipt is None
            assert failed.exit_code == 20
            assert "while it was read; run again when copying has ended" in str(failed.failure)
            now = set((tmp_path / "disturbed/receipts").rglob("*.json")) - there
            assert all("preview" in receipt.name for receipt in now), "of a map, not of the slide"
            with disturbed(path, monkeypatch, times=1):
                assert disturb.do(stage, index).receipt, "it starts over by itself"
        else:
            assert disturb.do(stage, index).receipt
    assert set(seen) == set(READERS[store])
    found = [
        {str(each.relative_to(line.config.out)): publish.file_sha256(each) for each in published(line.config.out)}
        for line in (calm, disturb)
    ]
    assert found[0] == found[1]


def published(root: Path) -> list[Path]:
    """Return the files of a run that are derived from its slides."""
    folders = ("tissue", "cuts", "stain", "patches", "predictions", "certificates", "heatmaps", "detections")
    return sorted(path for name in folders for path in (root / name).rglob("*") if path.is_file())


def test_a_reader_that_fails_since_the_slide_is_written_says_so(tmp_path: Path) -> None:
    """A partial copy that cannot be decoded is not a damaged slide; without a writer the error is the reader's."""
    path = tmp_path / "s.tif"
    path.write_bytes(b"slide")

    def read(meanwhile: Callable[[], None]) -> None:
        with content.unmodified(path, "s"):
            meanwhile()
            raise InputError("a tile cannot be decoded", "copy it again")

    with pytest.raises(SlideModified, match="the slide was written"):
        read(lambda: rewrite(path))
    with pytest.raises(InputError, match="cannot be decoded"):
        read(lambda: None)


def test_a_slide_with_a_new_link_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of the directory entry alone is detected, and the content is then hashed once."""
    path, hashed = tmp_path / "s.tif", []
    path.write_bytes(b"slide")
    monkeypatch.setattr(content, "sha256", lambda path: hashed.append(path) or "0" * 64)
    for _ in range(3):
        content.cached_sha256(path)
    before, signature = content.stamp(path), content.signature(path)
    while content.stamp(path) == before:
        (tmp_path / "link.tif").unlink(missing_ok=True)
        (tmp_path / "link.tif").hardlink_to(path)
    assert content.signature(path) == signature
    for _ in range(3):
        content.cached_sha256(path)
    assert len(hashed) == 2
