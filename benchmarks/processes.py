"""Points of the experiments that are measured in fresh processes, which start, load GoogLeNet and compute scores.

Every point starts its own processes, because start and load are part of the measurement, and because the peak memory of
a process includes its earlier work. Processes that run at the same time report when they are ready and begin together.
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
    """Return the card of a GoogLeNet with random weights, which is shared by all points."""
    from benchmarks import networks

    return str(networks.random_card("googlenet", Path(tempfile.mkdtemp(prefix="wsiflow-card-"))))


class _Process:
    """A fresh interpreter that works through one request."""

    def __init__(self, request: dict[str, Any]) -> None:
        """Start the process with a request, see `_serve`."""
        self._clock = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.processes", json.dumps(request)]
        self._running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def read(self) -> dict[str, float]:
        """Return the next line of the process as values, with the seconds since its start as ``since_s``."""
        assert self._running.stdout is not None
        values: dict[str, float] = json.loads(self._running.stdout.readline())
        return values | {"since_s": time.perf_counter() - self._clock}

    def go(self) -> None:
        """Signal the process to begin its work."""
        assert self._running.stdin is not None
        self._running.stdin.write("\n")
        self._running.stdin.flush()

    def end(self) -> None:
        """Wait for the process to end."""
        self._running.communicate()


def element(settings: dict[str, Any], *, seed: int) -> dict[str, float]:
    """Measure a fresh worker that predicts ``group_tiles`` tiles, like an element of an array job."""
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
    """Fill the machine's cores with processes of ``threads`` threads, and measure their joint rate."""
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
    rate = sum(one["windows"] / one["wall_s"] for one in done)
    return {
        "processes": count,
        "windows_s_core": rate / settings["cores"],
        "windows_cpu_s": sum(one["windows"] for one in done) / sum(one["cpu_s"] for one in done),
        "call_s": sum(one["wall_s"] / one["calls"] for one in done) / count,
        "rss_mb": sum(one["max_rss_mb"] for one in done),
    }


def batch(settings: dict[str, Any], *, seed: int) -> dict[str, float]:
    """Measure the window engine with ``batch`` windows per call."""
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


def _serve(request: dict[str, Any]) -> None:
    """Serve a request: report that the imports are done, then that the network is ready, then the work and its cost."""
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
    """Return the side in px of a square that holds the block and the windows that extend beyond it."""
    return 224 * (max(_BLOCKS[request["tiles"]]) + 1)


def _say(values: dict[str, float]) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
