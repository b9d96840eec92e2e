"""Resuming: a process that ends before any change of the file system is followed by one that gives the same bytes."""

import itertools
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_runs import COARSE, attempts, digests, over

from flows import compose
from flows.line import direct
from wsiflow.system import publish

# Every effect of the line is a place to crash; one in STRIDE is tried. WSIFLOW_CRASH_STRIDE=1 tries them all.
STRIDE = int(os.environ.get("WSIFLOW_CRASH_STRIDE", "79"))

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["flows.line", "flows.run", "wsiflow.run.stages.certify", "wsiflow.run.stages.choose", "wsiflow.run.stages.work"]
)


def line(manifest: Path, out: Path, last: int = -1) -> int:
    """Run in a child, which ends before effect number ``last``; return its exit code.

    Children are forked from a server that has imported everything and run nothing: what OpenVINO leaves in a process
    that has run a network does not survive a fork.
    """
    child = _SERVER.Process(target=run_line, args=(manifest, out, last))
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def run_line(manifest: Path, out: Path, last: int) -> None:
    seen = itertools.count()
    publish._effect = lambda *_: os._exit(137) if next(seen) == last else None
    config = compose.compose_config(over(manifest, out, "tiles.group_tiles=4"))
    os._exit(direct(config).exit_code)


def points(manifest: Path, folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield the crash points and the folder that a run left when it ended there."""
    for point in itertools.count(0, STRIDE):
        out = folder / str(point)
        code = line(manifest, out, point)
        assert code in (0, 137)
        yield point, out
        if code == 0:
            return


@pytest.mark.timeout(20_000)  # two minutes where nothing else runs, hours in full size
def test_a_run_that_ends_before_any_effect_is_finished_by_the_next(tiny_slides: Path, tmp_path: Path) -> None:
    """The next run gives the bytes of an undisturbed run, and repeats no finished task."""
    assert COARSE
    manifest = tiny_slides
    assert line(manifest, tmp_path / "undisturbed") == 0
    expected = digests(tmp_path / "undisturbed")
    tried = 0
    for point, out in points(manifest, tmp_path):
        kept = attempts(out)
        assert line(manifest, out) == 0
        assert kept.items() <= attempts(out).items(), f"crash point {point}: finished work was repeated"
        assert digests(out) == expected, f"crash point {point}"
        tried += 1
    assert tried > 150 / STRIDE, "the sweep went through the whole line"
