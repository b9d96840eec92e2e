"""Weights files that hold their network: what was written is what runs, and nothing else of the file does."""

import contextlib
import functools
import io
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wsiflow.errors import InputError
from wsiflow.model.card import ModelCard
from wsiflow.model.classifier import Classifier
from wsiflow.model.dense.network import densify
from wsiflow.model.engines.engine import is_convertible
from wsiflow.model.formats import export, registry, torchscript
from wsiflow.model.outputs import Outputs
from wsiflow.model.program import program

SIDE = 48


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(7)
    with torch.no_grad():
        yield


class Residual(nn.Module):
    """A small network in the manner of ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.block = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1))
        self.short = nn.Conv2d(8, 16, 1, 2)
        self.head = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.stem(x))
        x = torch.relu(self.block(x) + self.short(x))
        logits: torch.Tensor = self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))
        return logits


class Inception(nn.Module):
    """A small network in the manner of GoogLeNet and Inception, with branches, a gate and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True))
        self.one = nn.Sequential(nn.Conv2d(8, 4, 1), nn.PReLU(4))
        self.three = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6, eps=1e-3), nn.Hardswish())
        self.pooled = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(8, 6, 1), nn.ReLU6())
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.cat([self.one(x), self.three(x), self.pooled(x)], 1)
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


class Normed(nn.Module):
    """A small network in the manner of ConvNeXt, with linear layers over the channels of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.wide, self.narrow, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.narrow(nn.functional.gelu(self.wide(self.norm(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
        logits: torch.Tensor = self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class Attended(nn.Module):
    """A small network in the manner of ViT, which asks for the number of images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 16, 16), nn.Linear(8, 2)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 10, 8))
        self.queries = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        x = self.stem(x).reshape(n, 8, 9).permute(0, 2, 1)
        x = torch.cat([self.token.expand(n, -1, -1), x], 1) + self.places
        q, k, v = self.queries(x).reshape(n, 10, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, 10, 8)
        logits: torch.Tensor = self.head(nn.functional.layer_norm(x, (8,))[:, 0])
        return logits


NETWORKS = (Residual, Inception, Normed)


def varied(module: nn.Module) -> nn.Module:
    """Return a network whose batch normalisations are those of a trained network."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            layer.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return module.eval()


def images(n: int, side: int = SIDE) -> torch.Tensor:
    return nn.functional.interpolate(torch.randn(n, 3, side // 4, side // 4), scale_factor=4) + torch.randn(
        n, 3, side, side
    )


def archive(module: nn.Module, *inputs: torch.Tensor, batch: Any = torch.export.Dim.DYNAMIC, **changes: Any) -> bytes:
    """Return what torch.export.save writes for a network."""
    given = inputs or (torch.zeros(2, 3, SIDE, SIDE),)
    shapes = tuple({0: batch} for _ in given) if batch else None
    exported = torch.export.export(module.eval(), given, dynamic_shapes=shapes)
    if changes.get("is_decomposed"):
        exported = exported.run_decompositions()
    stream = io.BytesIO()
    torch.export.save(exported, stream)
    return stream.getvalue()


@functools.cache
def archive_of(network: Callable[[], nn.Module], *, is_decomposed: bool) -> tuple[nn.Module, bytes]:
    """Return a network and what torch.export.save writes for it, once for all tests."""
    module = varied(network())
    return module, archive(module, is_decomposed=is_decomposed)


def rewritten(data: bytes, edit: Callable[[dict[str, bytes]], None]) -> bytes:
    """Return an archive with edited members, which are named without the archive's own folder."""
    source = zipfile.ZipFile(io.BytesIO(data))
    members = {name.partition("/")[2]: source.read(name) for name in source.namelist()}
    edit(members)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as target:
        for name, content in members.items():
            target.writestr(f"archive/{name}", content)
    return stream.getvalue()


def edited(data: bytes, edit: Callable[[Any], None], member: str = "models/model.json") -> bytes:
    """Return an archive with an edited JSON."""

    def change(members: dict[str, bytes]) -> None:
        content = json.loads(members[member])
        edit(content)
        members[member] = json.dumps(content).encode()

    return rewritten(data, change)


def as_classifier(module: nn.Module, n_classes: int) -> Classifier:
    outputs = Outputs("logits", n_classes, (1,))
    names, mean = tuple("abc"[:n_classes]), (0.5, 0.5, 0.5)
    return Classifier(module.to(memory_format=torch.channels_last), names, outputs, SIDE, SIDE, 0.5, mean, mean, "", "")  # type: ignore[call-overload]


# --- torch.export


@pytest.mark.parametrize("network", [*NETWORKS, Attended])
def test_an_exported_program_gives_the_bits_of_its_module_for_batches_of_any_size(
    network: Callable[[], nn.Module],
) -> None:
    module = varied(network())
    read = export.module_of(export.write(module, SIDE), SIDE)
    for n in (1, 5):
        for form in (torch.contiguous_format, torch.channels_last):
            x = images(n).contiguous(memory_format=form)
            assert torch.equal(read(x), module(x))
    assert set(read.state_dict()) == {name for name in module.state_dict() if "num_batches" not in name}


@pytest.mark.parametrize("network", [*NETWORKS, Attended])
@pytest.mark.parametrize("is_decomposed", [False, True])
def test_backends_that_trace_an_exported_program_run_batches_of_any_size(
    network: Callable[[], nn.Module], is_decomposed: bool
) -> None:
    module, data = archive_of(network, is_decomposed=is_decomposed)
    read, x = export.module_of(data, SIDE), images(5)
    again = torch.jit.trace(read, images(2), check_trace=False)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(again(x), module(x), rtol=1e-5, atol=1e-6)


class Casting(nn.Module):
    """A network that converts what it computes to the type of its weights, and some of it to float32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 5, 4), nn.Linear(8, 2)
        self.register_buffer("shift", torch.linspace(0, 1, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x.to(self.conv.weight.dtype)).relu().mean((2, 3), dtype=torch.float32)
        x = nn.functional.layer_norm(x, (8,)).to(self.head.weight.dtype) + self.shift
        logits: torch.Tensor = self.head(x + torch.full((8,), 0.3, dtype=self.head.weight.dtype))
        return logits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_decomposed", [False, True])
def test_a_program_in_half_precision_runs_in_float32(dtype: torch.dtype, is_decomposed: bool) -> None:
    """Its weights keep their values, and constants and conversions follow their type."""
    module = Casting().to(dtype)
    data = archive(module, torch.zeros(2, 3, SIDE, SIDE, dtype=dtype), is_decomposed=is_decomposed)
    read, single, x = export.module_of(data, SIDE).float(), module.float(), images(3)
    torch.testing.assert_close(read(x), single(x), rtol=0, atol=2e-3)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("is_decomposed", [False, True])
def test_an_exported_program_runs_over_regions(network: Callable[[], nn.Module], is_decomposed: bool) -> None:
    module, data = archive_of(network, is_decomposed=is_decomposed)
    assert (b"as_strided" in data) == (is_decomposed and network is Normed), "which depends on how maps are stored"
    read, x = export.module_of(data, SIDE), images(3)
    torch.testing.assert_close(read(x), module(x), rtol=1e-5, atol=1e-6)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(read(last), module(x), rtol=1e-5, atol=1e-6)
    n_classes = module(x).shape[1]
    dense = densify(as_classifier(read, n_classes), SIDE)  # which compares regions with windows
    assert {"stem", "pool", "norm"} & {cut.name for cut in dense.facts.cuts}, (
        "the parts of the network have kept their names"
    )


def test_the_archives_of_older_versions_are_read() -> None:
    module, data = archive_of(Residual, is_decomposed=False)
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    pickled, empty = stream.getvalue(), io.BytesIO()
    torch.save({}, empty)

    def as_of_2_8(members: dict[str, bytes]) -> None:
        for name in [name for name in members if name.startswith("data/")]:
            del members[name]
        members |= {"data/weights/model.pt": pickled, "data/constants/model.pt": empty.getvalue()}

    x = images(2)
    assert torch.equal(export.module_of(rewritten(data, as_of_2_8), SIDE)(x), module(x))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as old:  # as of PyTorch 2.6
        old.writestr("version", "8.2")
        graph = zipfile.ZipFile(io.BytesIO(data)).read("archive/models/model.json")
        old.writestr("serialized_exported_program.json", graph)
        old.writestr("serialized_state_dict.pt", pickled)
        old.writestr("serialized_constants.pt", empty.getvalue())
    assert torch.equal(export.module_of(stream.getvalue(), SIDE)(x), module(x))


def test_weights_that_share_memory_and_lie_within_it_are_read() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            both = torch.randn(2, 4, 3)
            self.first, self.second = nn.Parameter(both[1]), nn.Parameter(both[0].t())
            self.scale = nn.Buffer(torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.mean((2, 3)) * self.scale).float() @ self.first.t() @ self.second.t()[:, :2]

    module, x = Tied(), images(2)
    assert torch.equal(export.module_of(archive(module), SIDE)(x), module(x))


def test_several_outputs_keep_their_names() -> None:
    class Several(Residual):
        def forward(self, x: torch.Tensor) -> Any:
            return {"features": x.mean((2, 3)), "logits": super().forward(x)}

    module, x = varied(Several()), images(2)
    outputs = export.module_of(archive(module), SIDE)(x)
    assert list(outputs) == ["features", "logits"]
    assert torch.equal(outputs["logits"], module(x)["logits"])
    chosen = registry.network(archive(module), card(2, output_name="logits"), Path())
    assert torch.equal(chosen(x), outputs["logits"])
    assert "pool" in {cut.name for cut in densify(as_classifier(chosen, 2), SIDE).facts.cuts}


def test_a_part_without_gradients_is_a_part_of_the_network() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = Residual(), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                x = self.backbone(x)
            logits: torch.Tensor = self.head(x)
            return logits

    module, x = varied(Frozen()), images(3)
    with torch.enable_grad():
        data = archive(module)
    assert b"wrap_with_set_grad_enabled" in data
    read = export.module_of(data, SIDE)
    assert torch.equal(read(x), module(x))
    assert "backbone.pool" in {cut.name for cut in densify(as_classifier(read, 2), SIDE).facts.cuts}


class Two(nn.Module):
    """A network with two inputs."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) + y.mean((2, 3))


class Silent(nn.Module):
    """A network without outputs."""

    def forward(self, x: torch.Tensor) -> None:
        x + 1


class Counting(nn.Module):
    """A network that counts its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Buffer(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return x.mean((2, 3)) + self.count


class Inverse(nn.Module):
    """A network of an operation that no classifier has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = torch.linalg.inv(x).mean((2, 3))
        return logits


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: archive(Two(), *[torch.zeros(2, 3, SIDE, SIDE)] * 2), "has 2 inputs, not one batch of images"),
        (lambda: archive(Silent()), "returns no tensor"),
        (lambda: archive(Counting()), r"changes its own weight.*model\.eval\(\)"),
        (lambda: archive(Counting(), is_decomposed=True), r"changes its own weights.*model\.eval\(\)"),
        (lambda: archive(nn.Sequential(Inverse())), r"calls 'torch.ops.aten.linalg_inv.* \(layer 0\); export"),
        (lambda: archive(Residual(), batch=None), r"batches of 2 alone; .*dynamic_shapes=\(\{0: torch.export.Dim"),
        (lambda: archive(Residual(), torch.zeros(2, 3, 64, 64)), r"\['n', 3, 64, 64\], not of \[n, 3, 48, 48\]"),
        (lambda: archive_of(Residual, is_decomposed=False)[1][:-30], "0 programs|not a whole archive"),
        (lambda: archive_of(Residual, is_decomposed=False)[1][200:], "damaged|not a whole archive"),
        (lambda: b"", "not a whole archive"),
    ],
)
def test_a_program_that_cannot_be_run_is_refused_in_one_line(data: Callable[[], bytes], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        export.module_of(data(), SIDE)
    assert "\n" not in str(caught.value)


class Touch:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        """Return the call that unpickling makes."""
        return Path.touch, (self.path,)


def _pickle(name: str, *, config: str = "") -> Callable[[bytes, Path], bytes]:
    """Return the attack of a pickle among the members, which a configuration may name."""

    def attack(data: bytes, ran: Path) -> bytes:
        stream = io.BytesIO()
        torch.save({"x": Touch(ran)}, stream)

        def change(members: dict[str, bytes]) -> None:
            members[name] = stream.getvalue()
            if name.rpartition("/")[2].startswith(("opaque", "custom")):
                members[name] = pickle.dumps(Touch(ran))
            if config:
                content = json.loads(members[config])
                file = name.rpartition("/")[2]
                meta = next(iter(content["config"].values()), {}) | {"path_name": file, "use_pickle": True}
                content["config"]["head.bias"] = {"tensor_meta": None, "is_param": False} | meta
                members[config] = json.dumps(content).encode()

        return rewritten(data, change)

    return attack


def _graph(edit: Callable[[Any, str], None]) -> Callable[[bytes, Path], bytes]:
    """Return the attack of a changed graph: given the JSON of the program, and source code that creates a file."""

    def attack(data: bytes, ran: Path) -> bytes:
        return edited(
            data, lambda whole: edit(whole["graph_module"], f"__import__('pathlib').Path({str(ran)!r}).touch()")
        )

    return attack


def _call(target: str, *arguments: tuple[str, Any]) -> Callable[[bytes, Path], bytes]:
    """Return the attack of another function as the target of the first call."""

    def edit(program: Any, code: str) -> None:
        path = code.split("'")[3]
        node = program["graph"]["nodes"][0]
        node["target"] = target
        if arguments:
            node["inputs"] = [
                {"name": name, "arg": {kind: path if content == "PATH" else content}, "kind": 1}
                for name, (kind, content) in arguments
            ]

    return _graph(edit)


def _renamed(program: Any, code: str) -> None:
    """Give every tensor, call and argument's value a name that is source code."""
    text = json.dumps(program)
    for name in ("conv2d", "x"):
        text = text.replace(json.dumps(name), json.dumps(f"{name}\n    {code}  #"))
    program.update(json.loads(text))


def _weight_path(program: Any, code: str) -> None:
    """Give a weight a path that is source code."""
    spec = program["signature"]["input_specs"][0]["parameter"]
    spec["parameter_name"] = f'stem.0") or {code} or ("'


def _argument_name(program: Any, code: str) -> None:
    program["graph"]["nodes"][0]["inputs"].append({"name": f"groups=1, **{{'a': {code}}}, x", "arg": {"as_int": 1}})


def _expression(program: Any, code: str) -> None:
    for meta in program["graph"]["tensor_values"].values():
        if meta["sizes"] and "as_expr" in meta["sizes"][0]:
            meta["sizes"][0] = {"as_expr": {"expr_str": code, "hint": {"as_int": 2}}}


def _notes(program: Any, code: str) -> None:
    for node in program["graph"]["nodes"]:
        node["metadata"] = {"nn_module_stack": f"a,b\n{code},c;{code},{code},{code}", "stack_trace": f"\n{code}"}


def _text(program: Any, code: str) -> None:
    node = next(node for node in program["graph"]["nodes"] if "conv2d" in node["target"])
    node["target"] = "torch.ops.aten.conv2d.padding"
    node["inputs"] = [*node["inputs"][:2], {"name": "padding", "arg": {"as_string": f"'+{code}+'"}}]


IMAGES = ("self", ("as_tensor", {"name": "x"}))


@pytest.mark.parametrize(
    ("attack", "is_refused"),
    [
        pytest.param(_pickle("data/weights/model.pt"), True, id="weights as a pickle"),
        pytest.param(_pickle("data/constants/model.pt"), True, id="constants as a pickle"),
        pytest.param(
            _pickle("data/weights/weight_0", config="data/weights/model_weights_config.json"), True, id="one weight"
        ),
        pytest.param(
            _pickle("data/constants/opaque_obj_0", config="data/constants/model_constants_config.json"),
            True,
            id="opaque",
        ),
        pytest.param(
            _pickle("data/constants/custom_obj_0", config="data/constants/model_constants_config.json"),
            True,
            id="custom",
        ),
        pytest.param(_pickle("data/sample_inputs/model.pt"), False, id="sample inputs, which are not read"),
        pytest.param(_pickle("data/aotinductor/model/wrapper.so"), True, id="compiled code"),
        pytest.param(
            _call("torch.ops.aten.save.default", IMAGES, ("filename", ("as_string", "PATH"))), True, id="save"
        ),
        pytest.param(
            _call(
                "torch.ops.aten.from_file.default",
                ("filename", ("as_string", "PATH")),
                ("shared", ("as_bool", True)),
                ("size", ("as_int", 9)),
            ),
            True,
            id="map a file",
        ),
        pytest.param(_call("torch.hub.load"), True, id="any function of PyTorch"),
        pytest.param(_call("os.system"), True, id="any function"),
        pytest.param(_call("torch.ops.aten.conv2d.__class__"), True, id="an attribute of an operation"),
        pytest.param(_call("torch.ops.higher_order.cond"), True, id="control flow"),
        pytest.param(_graph(_renamed), False, id="names of values"),
        pytest.param(_graph(_weight_path), True, id="path of a weight"),
        pytest.param(_graph(_argument_name), True, id="name of an argument"),
        pytest.param(_graph(_expression), False, id="expressions of sizes"),
        pytest.param(_graph(_notes), False, id="notes on calls"),
        pytest.param(_graph(_text), True, id="a text as an argument"),
    ],
)
def test_nothing_in_an_archive_runs(attack: Callable[[bytes, Path], bytes], is_refused: bool, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    data = attack(archive_of(Residual, is_decomposed=False)[1], ran)
    with pytest.raises(InputError) if is_refused else contextlib.nullcontext():
        module = export.module_of(data, SIDE)
        program(module, SIDE)
        module(images(1))
    assert not ran.exists()


# --- TorchScript


def card(n_classes: int, output_name: str = "") -> ModelCard:
    names = tuple("abc"[:n_classes])
    return ModelCard(
        name="script",
        architecture="export" if output_name else "torchscript",
        output_name=output_name,
        class_names=names,
        positive_class="b",
        window_px=SIDE,
        input_px=SIDE,
        spacing_um_px=0.5,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        weights="script.pt",
        sha256="0" * 64,
    )


def scripted(module: nn.Module, *, is_traced: bool = False) -> bytes:
    stream = io.BytesIO()
    module = module.eval()
    script = torch.jit.trace(module, images(1)) if is_traced else torch.jit.script(module)  # type: ignore[no-untyped-call]
    torch.jit.save(script, stream)
    return stream.getvalue()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WSIFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("is_traced", [False, True])
def test_a_torchscript_program_runs_over_regions(
    network: Callable[[], nn.Module], is_traced: bool, cache: Path
) -> None:
    module = varied(network())
    n_classes = module(images(1)).shape[1]
    read = torchscript.read(scripted(module, is_traced=is_traced), card(n_classes), Path("script.pt"))
    x = images(3)
    torch.testing.assert_close(read(x), module(x), rtol=1e-5, atol=1e-6)
    classifier = as_classifier(read, n_classes)
    assert is_convertible(classifier)
    dense = densify(classifier, SIDE)
    assert {"stem", "norm"} & {name.partition(".")[0] for name, _ in dense.facts.cuts}, (
        "weights name the parts of the network"
    )


def test_a_torchscript_program_is_converted_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = varied(Residual()), images(2)
    data = scripted(module)
    first = torchscript.read(data, card(2), Path("script.pt"))
    monkeypatch.setattr(torchscript, "_loaded", lambda *_: pytest.fail("the program was loaded again"))
    assert torch.equal(torchscript.read(data, card(2), Path("script.pt"))(x), first(x))
    assert len(list(cache.iterdir())) == 1


def test_a_torchscript_program_that_cannot_be_converted_stays_as_it_is(cache: Path) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = varied(Residual())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(int(x.abs().max()) % 2):
                x = x + 1.0
            logits: torch.Tensor = self.inner(x)
            return logits

    read = torchscript.read(scripted(Whole()), card(2), Path("script.pt"))
    assert isinstance(read, torch.jit.ScriptModule)
    assert not is_convertible(as_classifier(read, 2))


def test_a_conversion_with_other_outputs_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = export.write(varied(Residual()), SIDE)
    monkeypatch.setattr(torchscript, "_exported", lambda *_: other)
    read = torchscript.read(scripted(varied(Residual())), card(2), Path("script.pt"))
    assert isinstance(read, torch.jit.ScriptModule)
