"""Engines: all backends give PyTorch's scores, always the same bits, and report what they do not support."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from torch import nn

from wsiflow import model
from wsiflow.errors import EnvironmentFault, InputError, WsiflowError
from wsiflow.model.card import ModelSpec
from wsiflow.model.classifier import Classifier, predict, probe_image
from wsiflow.model.dense.network import densify
from wsiflow.model.engines import openvino
from wsiflow.model.engines.cache import cache_folder, cached
from wsiflow.model.engines.conversion import converted
from wsiflow.model.engines.engine import installed_backends, median_seconds, prepare, quantise, scores_from_pixels
from wsiflow.model.engines.openvino import _read, one_thread
from wsiflow.model.engines.spec import Engine, EngineSpec, Network
from wsiflow.system import machine
from wsiflow.system.machine import cpu_supports_bf16

STRIDE_PX = 16
SHAPES = ((240, 272), (448, 331), (320, 448))
FP32 = [EngineSpec("torch", "fp32"), EngineSpec("openvino", "fp32"), EngineSpec("onnxruntime", "fp32")]
BF16 = [EngineSpec("torch", "bf16"), EngineSpec("openvino", "bf16")]
OPENVINO, INT8 = EngineSpec("openvino", "fp32"), EngineSpec("openvino", "int8")

needs_bf16 = pytest.mark.skipif(not cpu_supports_bf16(), reason="this CPU has no bfloat16")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def demo() -> Classifier:
    fields = yaml.safe_load((Path(__file__).parents[2] / "conf/model/demo.yaml").read_text())
    return model.load(ModelSpec(**fields))


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    """Return the trained network that ships with wsiflow."""
    return demo()


def region(rows: int, cols: int) -> NDArray[np.uint8]:
    """Return squares of many colours, purple to white, uint8 (1, rows, cols, 3)."""
    tiles = [np.concatenate([probe_image(7 * row + col, 112) for col in range(7)], axis=1) for row in range(6)]
    return np.ascontiguousarray(np.concatenate(tiles)[None, :rows, :cols])


def windows(n: int) -> NDArray[np.uint8]:
    return np.stack([probe_image(seed, 224) for seed in range(n)])


def dense_network(classifier: Classifier, *, fixed: tuple[int, int] | None = None) -> Network:
    module = scores_from_pixels(classifier, densify(classifier, STRIDE_PX).module)
    return Network(lambda: module, "demo", region(*(fixed or (256, 272))), fixed=fixed is not None)


@pytest.fixture(scope="module")
def maps(classifier: Classifier) -> Network:
    """Return the network over regions of any size."""
    return dense_network(classifier)


@pytest.fixture
def tiny() -> Network:
    """Return a network that converts at once and takes features instead of pixels."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    return Network(lambda: module, "tiny", np.random.default_rng(0).random((2, 2, 5, 5), np.float32), fixed=True)


class Elsewhere(NamedTuple):
    """What another process printed, and the home that it had."""

    said: str
    home: Path


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    """Another process that runs the regions in another order, and all packages that may report their usage."""
    code = (
        "import json, pathlib, sys; sys.path.insert(0, sys.argv[1]); import test_engines as t\n"
        "maps, folder = t.dense_network(t.demo()), pathlib.Path(sys.argv[2])\n"
        "found = [t.digests(maps, spec, t.SHAPES[1::-1], folder) for spec in t.SPECS]\n"
        "network = t.Network(lambda: t.nn.Conv2d(3, 3, 3).eval(), 'k', t.np.ones((1, 3, 5, 5), t.np.float32), True)\n"
        "t.prepare(network, t.FP32[2], threads=1)(network.example)\n"
        "t.quantise(network, [network.example])\n"
        "assert not [name for name in sys.modules if name.startswith('openvino_telemetry.')]\n"
        "print(json.dumps(found))"
    )
    home, cache = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("cache")
    silenced = {"DO_NOT_TRACK", "ORT_DISABLE_TELEMETRY"}
    environ = {key: value for key, value in os.environ.items() if key not in silenced}
    result = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(cache)],
        env=environ | {"OMP_NUM_THREADS": "1", "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return Elsewhere(result.stdout, home)


@pytest.mark.parametrize("spec", FP32, ids=lambda spec: spec.backend)
def test_windows_have_the_classifiers_scores(spec: EngineSpec, classifier: Classifier, cache: Path) -> None:
    """On every backend the scores of windows are those of `predict`."""
    images = windows(5)
    network = Network(lambda: scores_from_pixels(classifier), "demo", images, fixed=True)
    found = prepare(network, spec, threads=1, cache=cache)(images)
    assert (found.dtype, found.shape) == (np.float32, (5,))
    assert np.abs(found - predict(classifier, images)).max() < 1e-5


@pytest.mark.parametrize("spec", FP32[1:], ids=lambda spec: spec.backend)
def test_regions_of_any_shape_have_pytorchs_scores(spec: EngineSpec, maps: Network, cache: Path) -> None:
    """One engine takes regions of all shapes in turn; the limit is that of fp32, which bfloat16 would exceed."""
    oracle, engine = (prepare(maps, each, threads=1, cache=cache) for each in (FP32[0], spec))
    for shape in SHAPES:
        expected, found = oracle(region(*shape)), engine(region(*shape))
        assert found.shape == (1, *((side - 224) // STRIDE_PX + 1 for side in shape))
        assert np.abs(found - expected).max() < 5e-5
    assert expected.std() > 0.01


@needs_bf16
@pytest.mark.parametrize("spec", BF16, ids=lambda spec: spec.backend)
def test_bfloat16_is_near_fp32(spec: EngineSpec, maps: Network, cache: Path) -> None:
    """Scores deviate by at most 0.002 in the mean and 0.02 anywhere, but are not those of fp32."""
    oracle, engine = (prepare(maps, each, threads=1, cache=cache) for each in (FP32[0], spec))
    difference = np.abs(engine(region(*SHAPES[-1])) - oracle(region(*SHAPES[-1])))
    assert difference.mean() < 0.002
    assert 1e-5 < difference.max() < 0.02


SPECS = [OPENVINO, BF16[1]] if cpu_supports_bf16() else [OPENVINO]


def test_bits_do_not_depend_on_process_order_or_open_shapes(
    classifier: Classifier, maps: Network, cache: Path, elsewhere: Elsewhere
) -> None:
    """Former shapes, another process or conversion, and a graph for one shape give the same bits."""
    shape = SHAPES[1]
    fixed = dense_network(classifier, fixed=shape)
    here = [digests(maps, spec, SHAPES[:2], cache) for spec in SPECS]
    assert json.loads(elsewhere.said) == here
    for spec, found in zip(SPECS, here, strict=True):
        assert digests(fixed, spec, [shape], cache)[str(shape)] == found[str(shape)]


def test_no_usage_is_reported(elsewhere: Elsewhere) -> None:
    """OpenVINO, NNCF and ONNX Runtime print nothing and leave no consent file, machine id or event queue."""
    assert elsewhere.said.count("\n") == 1
    assert list(elsewhere.home.rglob("*")) == []


def digests(network: Network, spec: EngineSpec, shapes: Sequence[tuple[int, int]], folder: Path) -> dict[str, str]:
    """Return the hashes of the scores of each region, run in this order."""
    engine = prepare(network, spec, threads=1, cache=folder)
    return {str(shape): hashlib.sha256(engine(region(*shape)).tobytes()).hexdigest() for shape in shapes}


def test_int8_is_near_fp32(maps: Network, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Calibrated on other such regions, it deviates by at most 0.02 in the mean, and nothing is printed."""
    samples = [region(448, 512)[:, -240:, -256:], region(560, 512)[:, -272:, :240]]
    quantised = quantise(maps, samples, cache=cache)
    assert capsys.readouterr().out == ""
    int8, oracle = prepare(maps, INT8, threads=1, quantised=quantised), prepare(maps, FP32[0], threads=1)
    for shape in SHAPES[:2]:
        difference = np.abs(int8(region(*shape)) - oracle(region(*shape)))
        assert 1e-5 < difference.mean() < 0.02


def test_the_same_samples_give_the_same_bytes(tiny: Network, tmp_path: Path) -> None:
    """Former conversions and the cache do not change the bytes; other samples do."""
    samples = [np.random.default_rng(seed).random((2, 2, 5, 5), np.float32) for seed in range(3)]
    first = quantise(tiny, samples, cache=tmp_path)
    assert quantise(tiny, samples) == quantise(tiny, iter(samples), cache=tmp_path) == first
    assert quantise(tiny, samples[:1], cache=tmp_path) != first


def test_calibration_runs_with_one_thread(tiny: Network) -> None:
    """NNCF would use all cores; afterwards OpenVINO is restored."""
    _, content = converted(tiny, "openvino", None)
    import openvino

    core = openvino.Core
    with one_thread():
        made = openvino.Core().compile_model(_read(content), device_name="CPU", config=None)
    assert made.get_property("INFERENCE_NUM_THREADS") == 1
    assert openvino.Core is core


def test_int8_needs_samples_and_belongs_to_a_calibrated_network(tiny: Network) -> None:
    """Missing samples are an input error; a missing or unneeded calibration is a defect of wsiflow."""
    with pytest.raises(InputError, match="no pixels for the calibration"):
        quantise(tiny, [])
    with pytest.raises(WsiflowError, match="must be given for int8"):
        prepare(tiny, INT8, threads=1)
    with pytest.raises(WsiflowError, match="must be given for int8"):
        prepare(tiny, OPENVINO, threads=1, quantised=b"")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (EngineSpec("torch", "int8"), "torch runs fp32 and bf16, not int8; set inference.backend to openvino"),
        (EngineSpec("onnxruntime", "int8"), "onnxruntime runs fp32, not int8; set inference.backend to openvino"),
        (EngineSpec("onnxruntime", "bf16"), "not bf16; set inference.backend to openvino or torch"),
    ],
)
def test_a_precision_a_backend_does_not_have_is_refused(spec: EngineSpec, message: str, tiny: Network) -> None:
    """The message names the backends that support it."""
    with pytest.raises(InputError, match=message):
        prepare(tiny, spec, threads=1)


@pytest.mark.parametrize("spec", BF16, ids=lambda spec: spec.backend)
def test_bfloat16_is_refused_where_it_would_be_emulated(
    spec: EngineSpec, tiny: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU with only AVX512 emulates it, slower than fp32."""
    monkeypatch.setattr(machine, "cpu_flags", lambda: {"avx512f", "avx512_vnni"})
    with pytest.raises(EnvironmentFault, match="this CPU has no bfloat16"):
        prepare(tiny, spec, threads=1)
    monkeypatch.setattr(machine, "cpu_flags", lambda: {"avx512f", "amx_bf16"})
    assert prepare(tiny, spec, threads=1)


def test_missing_packages_are_named_with_their_remedy(tiny: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime and NNCF are optional."""
    for name in ("onnx", "onnxruntime", "nncf"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EnvironmentFault, match=r"onnxruntime cannot be used: .* pip install 'wsiflow\[onnxruntime\]'"):
        prepare(tiny, FP32[2], threads=1)
    with pytest.raises(EnvironmentFault, match=r"nncf cannot be used: .* pip install 'wsiflow\[int8\]'"):
        quantise(tiny, [tiny.example])
    assert installed_backends() == ("openvino", "torch")


class Exotic(nn.Module):
    """A network with an operation that only PyTorch supports."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x).real


@pytest.mark.parametrize("spec", FP32[1:], ids=lambda spec: spec.backend)
def test_a_network_that_cannot_be_converted_is_an_input_error(spec: EngineSpec) -> None:
    """The error is an input error, and its message says that PyTorch runs the network."""
    network = Network(lambda: Exotic().eval(), "exotic", np.eye(3, dtype=np.float32)[None], fixed=True)
    with pytest.raises(InputError, match=r"cannot be converted to .*; set inference.backend=torch"):
        prepare(network, spec, threads=1)
    assert prepare(network, FP32[0], threads=1)(network.example).tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("spec", FP32, ids=lambda spec: spec.backend)
def test_results_are_the_callers_and_any_memory_order_serves(spec: EngineSpec, tiny: Network) -> None:
    """A later call changes no earlier result; arrays may be read-only or views."""
    engine = prepare(tiny, spec, threads=1)
    first = engine(tiny.example)
    kept = first.copy()
    wide = np.random.default_rng(1).random((2, 5, 5, 4), np.float32)
    wide.setflags(write=False)
    view = wide.transpose(0, 3, 1, 2)[:, ::2]
    assert (engine(view) == engine(view.copy())).all()
    assert (first == kept).all()
    assert (engine(view) != kept).any()


def test_arrays_of_another_form_are_refused(tiny: Network, maps: Network, cache: Path) -> None:
    """OpenVINO would cast floats to bytes, and a batch of another size is another shape."""
    exact, free = prepare(tiny, OPENVINO, threads=1), prepare(maps, OPENVINO, threads=1, cache=cache)
    for wrong in (tiny.example[:1], tiny.example[:, :, 1:], tiny.example[0], tiny.example.astype(np.float64)):
        with pytest.raises(WsiflowError, match="the network takes float32"):
            exact(wrong)
    for wrong in (
        region(240, 240).astype(np.float32),
        np.concatenate([region(240, 240)] * 2),
        region(240, 240)[..., 0],
    ):
        with pytest.raises(WsiflowError, match="the network takes uint8"):
            free(wrong)


def count_conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record every conversion that is not answered from the cache."""
    made: list[str] = []
    packed = openvino.packed

    def record(graph: object) -> bytes:
        made.append("openvino")
        return packed(graph)

    monkeypatch.setattr(openvino, "packed", record)
    return made


def damage(path: Path, how: Callable[[bytes], bytes]) -> None:
    path.write_bytes(how(path.read_bytes()))


def test_a_network_is_converted_once(tiny: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time it comes from the cache; another network, example or key does not."""
    made = count_conversions(monkeypatch)
    expected = prepare(tiny, OPENVINO, threads=1, cache=tmp_path / "new")(tiny.example)
    again = prepare(tiny, OPENVINO, threads=1, cache=tmp_path / "new")(tiny.example)
    assert len(made) == 1
    assert (again == expected).all()
    for other in (tiny._replace(key="b"), tiny._replace(example=tiny.example[:1]), tiny._replace(fixed=False)):
        prepare(other, OPENVINO, threads=1, cache=tmp_path / "new")
    assert len(made) == 4
    unbuilt = tiny._replace(build=lambda: pytest.fail("it was built, and its graph is kept"))
    assert (prepare(unbuilt, OPENVINO, threads=1, cache=tmp_path / "new")(tiny.example) == expected).all()


@pytest.mark.parametrize(
    "how",
    [
        lambda _: b"",
        lambda data: data[:20],
        lambda data: data[:-1],
        lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
    ],
    ids=["empty", "hash only", "cut", "one bit"],
)
def test_a_damaged_entry_is_computed_again(
    how: Callable[[bytes], bytes], tiny: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged entry is never an error, and afterwards it is intact."""
    made = count_conversions(monkeypatch)
    expected = prepare(tiny, OPENVINO, threads=1, cache=tmp_path)(tiny.example)
    (entry,) = tmp_path.iterdir()
    damage(entry, how)
    assert (prepare(tiny, OPENVINO, threads=1, cache=tmp_path)(tiny.example) == expected).all()
    assert len(made) == 2
    prepare(tiny, OPENVINO, threads=1, cache=tmp_path)
    assert len(made) == 2


def test_a_folder_that_cannot_be_written_is_no_cache(tmp_path: Path) -> None:
    """If the folder is a file, or an entry is a folder, the content is computed and no file is left."""
    (tmp_path / "file").write_text("")
    assert cached(tmp_path / "file", "key", lambda: b"made") == b"made"
    (tmp_path / "key").mkdir()
    assert cached(tmp_path, "key", lambda: b"made") == b"made"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "key"]
    assert cached(None, "key", lambda: b"made") == b"made"


def test_racing_for_an_entry_is_harmless(tmp_path: Path) -> None:
    """All processes miss, all compute, each gets the content, and one file is left."""
    ready, content = threading.Barrier(4), b"x" * 1_000_000
    found: list[bytes] = []

    def make() -> bytes:
        ready.wait()
        return content

    racers = [threading.Thread(target=lambda: found.append(cached(tmp_path, "key", make))) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert found == [content] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    assert cached(tmp_path, "key", lambda: b"") == content


def test_where_the_cache_is() -> None:
    """The variable of wsiflow comes first, then that of the desktop standard, then the home."""
    assert cache_folder({"WSIFLOW_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert cache_folder({"WSIFLOW_CACHE": "", "XDG_CACHE_HOME": "/b"}) == Path("/b/wsiflow")
    assert cache_folder({}) == Path.home() / ".cache/wsiflow"


class Clock:
    """A clock that advances only when an engine runs."""

    def __init__(self) -> None:
        self.now, self.ran = 0.0, ""

    def engine(self, name: str, *seconds: float) -> Engine:
        """Return an engine that takes these times in turn, and then always the last one."""
        times = list(seconds)

        def run(inputs: NDArray[np.uint8]) -> NDArray[np.float32]:
            self.now += times.pop(0) if len(times) > 1 else times[0]
            self.ran += name
            return np.zeros(1, np.float32)

        return run


def test_the_fastest_is_chosen_by_medians_of_turns() -> None:
    """First runs do not count, candidates take turns, and a single disturbance does not decide."""
    clock = Clock()
    candidates = {"a": clock.engine("a", 1, 3.0), "b": clock.engine("b", 50, 2, 90, 2.0)}
    assert list(median_seconds(candidates, region(8, 8), seconds=105, clock=lambda: clock.now).items()) == [
        ("b", 2.0),
        ("a", 3.0),
    ]
    assert clock.ran == "ab" * 5  # once to warm up, then 5, 93, 5 and 5 s


def test_a_slow_candidate_is_measured_once() -> None:
    """The time is over after the first turn, so each runs twice."""
    clock = Clock()
    assert median_seconds({"a": clock.engine("a", 9)}, region(8, 8), clock=lambda: clock.now) == {"a": 9}
    assert clock.ran == "aa"


def test_real_engines_are_distinguished(tiny: Network) -> None:
    """An engine that runs a network fifty times takes longer, however busy the machine is."""
    once = prepare(tiny, OPENVINO, threads=1)
    found = median_seconds(
        {"often": lambda inputs: np.stack([once(inputs) for _ in range(50)]), "once": once}, tiny.example, seconds=0.2
    )
    assert list(found) == ["once", "often"]
    assert 0 < found["once"] < found["often"]
