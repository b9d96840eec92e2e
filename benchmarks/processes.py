"""Points of the experiments that are measured: fresh processes that start, load GoogLeNet and compute scores.

Every point runs processes of its own, since the memory of one that has done something before is not its own, and since
starting is a part of what is measured. Processes that are to run side by side say when they are ready, and begin
together.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

_BLOCKS = {1: (1, 1), 8: (2, 4), 56: (7, 8), 112: (7, 16)}
_ALL_CORES_S = 6.0


@cache
def _card() -> str:
    """Return the card of a GoogLeNet with random weights, which stays for the other points."""
    from benchmarks import networks

    return str(networks.random_card("googlenet", Path(tempfile.mkdtemp(prefix="wsiflow-card-"))))


class _Process:
    """A fresh interpreter that works through one request."""

    def __init__(self, request: dict[str, Any]) -> None:
        """Start it."""
        self._clock = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.processes", json.dumps(request)]
        self._running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def read(self) -> dict[str, float]:
        """Return its next line, with the seconds since it was started."""
        assert self._running.stdout is not None
        found: dict[str, float] = json.loads(self._running.stdout.readline())
        return found | {"since_s": time.perf_counter() - self._clock}

    def go(self) -> None:
        """Let it begin."""
        assert self._running.stdin is not None
        self._running.stdin.write("\n")
        self._running.stdin.flush()

    def end(self) -> None:
        """Wait for it."""
        self._running.communicate()


def element(settings: dict[str, Any], *, seed: int) -> dict[str, float]:
    """Have a fresh worker predict so many tiles, as an array's element does."""
    tiles = settings["group_tiles"]
    process = _Process({"card": _card(), "engine": "dense", "tiles": tiles, "threads": 1, "seed": seed})
    begun, ready = process.read(), process.read()
    process.go()
    done = process.read()
    process.end()
    overhead_s = ready["since_s"]
    return {
        "start_s": begun["since_s"],
        "load_s": ready["since_s"] - begun["since_s"],
        "predict_s": done["wall_s"],
        "overhead_share": overhead_s / (overhead_s + done["wall_s"]),
        "max_rss_mb": done["max_rss_mb"],
    }


def threads(settings: dict[str, Any], *, seed: int) -> dict[str, float]:
    """Fill the machine's cores with processes of so many threads, and count what they do together."""
    each = settings["threads"]
    count = max(1, settings["cores"] // each)
    request = {
        "card": _card(),
        "engine": settings["engine"],
        "tiles": 1 if settings["quick"] else 8,
        "threads": each,
        "seconds": 1.0 if settings["quick"] else _ALL_CORES_S,
        "seed": seed,
    }
    running = [_Process(request) for _ in range(count)]
    for process in running:
        process.read(), process.read()
    for process in running:
        process.go()
    done = [process.read() for process in running]
    for process in running:
        process.end()
    rate = sum(found["windows"] / found["wall_s"] for found in done)
    return {
        "processes": count,
        "windows_s_core": rate / settings["cores"],
        "windows_cpu_s": sum(found["windows"] for found in done) / sum(found["cpu_s"] for found in done),
        "call_s": sum(found["wall_s"] / found["calls"] for found in done) / count,
        "rss_mb": sum(found["max_rss_mb"] for found in done),
    }


def batch(settings: dict[str, Any], *, seed: int) -> dict[str, float]:
    """Compute scores window by window with so many windows a call."""
    request = {
        "card": _card(),
        "engine": "window",
        "backend": settings["backend"],
        "tiles": 1,
        "threads": 1,
        "batch": settings["batch"],
        "windows": max(settings["batch"], settings["windows"]),
        "seed": seed,
    }
    process = _Process(request)
    process.read(), process.read()
    process.go()
    done = process.read()
    process.end()
    return {"windows_cpu_s": done["windows"] / done["cpu_s"], "rss_mb": done["max_rss_mb"]}


POINTS = {"element": element, "threads": threads, "batch": batch}


def _answer(request: dict[str, Any]) -> None:
    """Do what is asked for: say that the imports are done, then that the network is ready, then what it did."""
    from benchmarks import networks
    from wsiflow.model.classifier import load

    _say({})
    pixels = networks.tissue(_side_px(request))
    how = networks.choice(request["engine"], request.get("backend", "openvino"), "fp32")
    how = how._replace(batch=request.get("batch", networks.BATCH))
    made = networks.prepared(load(networks.spec(request["card"])), how, pixels, threads=request["threads"])
    if request["engine"] == "window":
        cut = networks.windows(pixels, networks.WINDOWS_PER_TILE)
        cut = [cut[i % len(cut)] for i in range(request.get("windows", networks.BATCH * 4))]
        networks.run_windows(made, cut[: how.batch])
    else:
        rows, cols = _BLOCKS[request["tiles"]]
        pixels = pixels[: (rows + 1) * networks.TILE_PX, : (cols + 1) * networks.TILE_PX]
    _say({})
    sys.stdin.readline()
    clock, cpu, calls, windows = time.perf_counter(), time.process_time(), 0, 0
    while not calls or time.perf_counter() - clock < request.get("seconds", 0.0):
        if request["engine"] == "window":
            windows += len(networks.run_windows(made, cut))
        else:
            windows += networks.run_region(made, pixels).size
        calls += 1
    _say(
        {
            "windows": windows,
            "calls": calls,
            "wall_s": time.perf_counter() - clock,
            "cpu_s": time.process_time() - cpu,
            "max_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
        }
    )


def _side_px(request: dict[str, Any]) -> int:
    """Return the side of a square that holds the block and the windows that reach beyond it."""
    return 224 * (max(_BLOCKS[request["tiles"]]) + 1)


def _say(values: dict[str, float]) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _answer(json.loads(sys.argv[1]))
