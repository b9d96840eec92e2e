"""An ONNX file is the network that it holds: as ONNX Runtime runs it, as it was written, and over whole regions."""

import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model.test_dense import classifier, inception, scores_of, texture, trained, windows_scores
from torch import nn
from torch.nn import functional

from wsiflow.errors import InputError
from wsiflow.model.card import ModelCard
from wsiflow.model.dense.network import densify
from wsiflow.model.formats import onnx as onnx_format
from wsiflow.model.formats.registry import FORMATS, network

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
helper, numpy_helper, FLOAT = onnx.helper, onnx.numpy_helper, onnx.TensorProto.FLOAT
SIDE = 16


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(3)
    with torch.no_grad():
        yield


def card(side: int = SIDE, **fields: Any) -> ModelCard:
    return ModelCard(
        name="net",
        architecture="onnx",
        class_names=("normal", "tumor"),
        positive_class="tumor",
        window_px=side,
        input_px=side,
        spacing_um_px=0.5,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        weights="net.onnx",
        sha256="0" * 64,
        **fields,
    )


def graph(
    nodes: Sequence[Any],
    weights: dict[str, Any] | None = None,
    *,
    opset: int = 17,
    shape: Sequence[Any] = ("n", 3, SIDE, SIDE),
    outputs: Sequence[str] = ("y",),
) -> Any:
    """Return a graph from ``x`` to ``y``."""
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()]
    image = helper.make_tensor_value_info("x", FLOAT, list(shape))
    results = [helper.make_value_info(name, onnx.TypeProto()) for name in outputs]
    content = helper.make_graph(list(nodes), "net", [image], results, initializers)
    return helper.make_model(content, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def read(model: Any, path: Path = Path("net.onnx"), side: int = SIDE, **fields: Any) -> nn.Module:
    data = model if isinstance(model, bytes) else model.SerializeToString()
    return onnx_format.read(data, card(side, **fields), path)


def expected(model: Any, images: torch.Tensor) -> list[np.ndarray]:
    """Return what ONNX Runtime returns."""
    inferred = onnx.shape_inference.infer_shapes(model)  # it wants the types of outputs
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(inferred.SerializeToString(), options, ["CPUExecutionProvider"])
    return list(session.run(None, {"x": images.numpy()}))


def node(kind: str, *inputs: str, outputs: Sequence[str] = ("y",), **attributes: Any) -> Any:
    return helper.make_node(
        kind,
        list(inputs) or ["x"],
        list(outputs),
        name=f"my_{kind}{'' if outputs[0] == 'y' else outputs[0]}",
        **attributes,
    )


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(0, 0.5, shape).astype(np.float32)


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


W = weights(4, 3, 3, 3)
C3 = np.array([0.5, 1.5, 1.0], np.float32)
# Operator, inputs after x, attributes, and the version of operators.
CASES: list[tuple[str, list[Any], dict[str, Any], int]] = [
    *(
        ("Conv", [W], {"auto_pad": pad, "strides": [s, s], "dilations": [d, d]}, 11)
        for pad in ("SAME_UPPER", "SAME_LOWER", "VALID")
        for s, d in ((1, 1), (2, 1), (3, 1))
    ),
    ("Conv", [W], {"dilations": [2, 1], "pads": [2, 1, 2, 1]}, 11),
    ("Conv", [weights(6, 1, 3, 2), weights(6)], {"group": 3, "pads": [1, 0, 2, 1], "kernel_shape": [3, 2]}, 22),
    ("BatchNormalization", [C3, C3, C3 - 1, C3], {"epsilon": 0.01, "momentum": 0.5}, 14),
    *(
        (kind, [], {}, 20)
        for kind in (
            *("Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Softplus"),
            *("Softsign", "Erf", "Gelu", "Mish", "Sqrt", "Exp", "Log", "Neg", "Abs", "Reciprocal", "Floor", "Ceil"),
            *("GlobalAveragePool", "GlobalMaxPool", "Identity", "Dropout", "Flatten", "Transpose", "IsNaN", "Softmax"),
        )
    ),
    ("LeakyRelu", [], {"alpha": 0.3}, 11),
    ("Elu", [], {"alpha": 0.3}, 11),
    ("Selu", [], {"alpha": 1.3, "gamma": 0.7}, 11),
    ("HardSigmoid", [], {"alpha": 1 / 6}, 11),
    ("HardSigmoid", [], {"alpha": 0.3, "beta": 0.4}, 11),
    ("Gelu", [], {"approximate": "tanh"}, 20),
    ("PRelu", [C3.reshape(3, 1, 1)], {}, 11),
    ("PRelu", [weights(16)], {}, 16),
    ("Clip", [np.float32(-0.2), np.float32(0.4)], {}, 11),
    ("Clip", [None, np.float32(0.4)], {}, 13),
    *(
        (kind, [], attributes | {"kernel_shape": [3, 3]}, 19)
        for kind in ("MaxPool", "AveragePool")
        for attributes in (
            {"strides": [2, 2], "ceil_mode": 1},
            {"strides": [2, 2], "pads": [1, 1, 1, 1]},
            {"strides": [3, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1},
            {"strides": [2, 2], "pads": [0, 0, 1, 1]},
            {"strides": [2, 2], "pads": [0, 1, 2, 2]},
            {"auto_pad": "SAME_UPPER"},
            {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
            {"auto_pad": "VALID", "strides": [2, 2]},
        )
    ),
    *(
        ("AveragePool", [], {"kernel_shape": [3, 3], "strides": [s, s], "pads": [1] * 4, "ceil_mode": 1} | counted, 19)
        for s in (2, 3)
        for counted in ({"count_include_pad": 1}, {})
    ),
    ("MaxPool", [], {"kernel_shape": [3, 2], "dilations": [2, 1], "strides": [2, 1], "pads": [1, 0, 1, 0]}, 12),
    ("AveragePool", [], {"kernel_shape": [3, 3], "count_include_pad": 1, "pads": [1, 1, 1, 1]}, 11),
    ("AveragePool", [], {"kernel_shape": [3, 3], "count_include_pad": 1, "pads": [0, 0, 1, 1], "strides": [2, 2]}, 11),
    *(
        (kind, given, attributes | {"keepdims": keep}, opset)
        for kind, opsets in (("ReduceMean", (11, 18)), ("ReduceMax", (13, 20)), ("ReduceSum", (11, 13)))
        for opset in opsets
        for keep in (0, 1)
        for given, attributes in [([], {"axes": [2, -1]}) if opset in {11, opsets[0]} else ([numbers(-2, 3)], {})]
    ),
    ("ReduceMin", [], {"axes": [1], "keepdims": 1}, 13),
    ("ReduceL2", [], {"axes": [1], "keepdims": 1}, 13),
    ("ReduceProd", [], {"axes": [3], "keepdims": 0}, 13),
    *((kind, [C3.reshape(1, 3, 1, 1)], {}, 13) for kind in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Sum")),
    *((kind, [C3.reshape(3, 1, 1)], {}, 17) for kind in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")),
    ("Pow", [np.float32(2)], {}, 13),
    ("Pow", [C3.reshape(3, 1, 1)], {}, 13),
    ("Mod", [C3.reshape(3, 1, 1)], {"fmod": 1}, 13),
    ("Concat", ["x"], {"axis": -1}, 13),
    ("Split", [], {"axis": 1}, 17),
    ("Split", [], {"axis": 3, "split": [10, 6]}, 11),
    ("Split", [numbers(10, 6)], {"axis": -1}, 13),
    ("Split", [], {"axis": 2, "num_outputs": 2}, 18),
    ("Slice", [numbers(1, 2), numbers(-1, 2**31), numbers(2, 3), numbers(2, 1)], {}, 13),
    ("Slice", [numbers(-1), numbers(-(2**31)), numbers(1), numbers(-1)], {}, 13),
    ("Gather", [numbers(2, 0, -1)], {"axis": 1}, 13),
    ("Gather", [np.int64(-1)], {"axis": 3}, 13),
    ("Gather", [numbers(0, 1, 2, 2).reshape(2, 2)], {"axis": 1}, 13),
    ("ScatterND", [numbers(1, 0, 1, 2).reshape(2, 2), weights(2, SIDE, SIDE)], {}, 16),
    ("Pad", [numbers(0, 0, 1, 2, 0, 0, 0, 3), np.float32(0.7)], {}, 13),
    ("Pad", [numbers(0, 0, 1, 2, 0, 1, 0, -3)], {}, 11),
    ("Pad", [numbers(1, 2), None, numbers(3)], {"mode": "reflect"}, 18),
    ("Pad", [numbers(0, 0, 1, 2, 0, 0, 3, 4)], {"mode": "edge"}, 13),
    ("Flatten", [], {"axis": 2}, 13),
    ("Flatten", [], {"axis": -1}, 13),
    ("Reshape", [numbers(0, -1, 8, 2)], {}, 13),
    ("Reshape", [numbers(-1, 3 * SIDE * SIDE)], {}, 13),
    ("Transpose", [], {"perm": [0, 2, 3, 1]}, 13),
    ("Unsqueeze", [numbers(1, -1)], {}, 13),
    ("Unsqueeze", [], {"axes": [0, 2]}, 11),
    ("MatMul", [weights(16, 5)], {}, 13),
    ("MatMul", [weights(3, 16, 5)], {}, 13),
    ("Einsum", [weights(16, 5)], {"equation": "nchw,wd->nchd"}, 13),
    *(
        (kind, [], attributes, opset)
        for kind in ("Softmax", "LogSoftmax")
        for attributes, opset in (({}, 11), ({"axis": 2}, 11), ({"axis": 3}, 11), ({"axis": 1}, 13), ({}, 13))
    ),
    ("Cast", [], {"to": onnx.TensorProto.DOUBLE}, 13),
    ("LRN", [], {"size": 3, "alpha": 0.1, "beta": 0.5, "bias": 2.0}, 13),
    ("LayerNormalization", [weights(16), weights(16)], {"epsilon": 0.01}, 17),
    ("LayerNormalization", [weights(3, 16, 16)], {"axis": 1}, 17),
    ("GroupNormalization", [C3, C3], {"num_groups": 3}, 21),
    ("InstanceNormalization", [C3, C3], {}, 13),
    ("Tile", [numbers(1, 2, 1, 3)], {}, 13),
    ("SpaceToDepth", [], {"blocksize": 4}, 13),
    *(
        ("Resize", given, dict(mode=mode, coordinate_transformation_mode=place, **more, **axes), 18)
        for given in ([None, np.array([1, 1, 2, 1.25], np.float32)], [None, None, numbers(24, 9)])
        for axes in ([{}, {"axes": [2, 3]}][len(given) - 2],)
        for mode, place, more in (
            *(("nearest", "asymmetric", {"nearest_mode": rounding}) for rounding in ("floor", "round_prefer_ceil")),
            *(("nearest", "half_pixel", {"nearest_mode": r}) for r in ("round_prefer_floor", "round_prefer_ceil")),
            ("nearest", "align_corners", {}),
            ("linear", "half_pixel", {}),
            ("linear", "pytorch_half_pixel", {}),
            ("linear", "align_corners", {}),
        )
    ),
]


@pytest.mark.parametrize(("kind", "more", "attributes", "opset"), CASES)
def test_an_operator_gives_what_onnx_runtime_gives(
    kind: str, more: list[Any], attributes: dict[str, Any], opset: int
) -> None:
    names, values = ["x"], {}
    for i, value in enumerate(more):
        is_name = value is None or isinstance(value, str)
        names.append((value or "") if is_name else f"w{i}")
        values |= {} if is_name else {f"w{i}": value}
    count = len(attributes.get("split", more[0] if kind == "Split" and more else [0, 0, 0]))
    outputs = [f"y{i}" for i in range(attributes.get("num_outputs", count))] if kind == "Split" else ["y"]
    model = graph([node(kind, *names, outputs=outputs, **attributes)], values, opset=opset, outputs=outputs)
    images = torch.randn(2, 3, SIDE, SIDE)
    images = images.abs() + 0.01 if kind in {"Sqrt", "Log"} else images
    answer = read(model)(images)
    answers = list(answer.values()) if isinstance(answer, dict) else [answer]
    for one, other in zip(answers, expected(model, images), strict=True):
        assert tuple(one.shape) == other.shape
        np.testing.assert_allclose(one.numpy(), other, rtol=2e-4, atol=2e-5)


# --- networks


class Residual(nn.Module):
    """A network with what exporters write in several ways: shapes, functions, pooling and parts of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=4), nn.Hardswish(), nn.Conv2d(8, 8, 1), nn.GELU())
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.deep(x)
        left, right = x.chunk(2, 1)
        n, _, h, w = right.shape
        shuffled = right.reshape(n, 2, 2, h, w).transpose(1, 2).reshape(n, 4, h, w)
        x = torch.cat([functional.silu(left), shuffled], 1)
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(functional.adaptive_avg_pool2d(functional.leaky_relu(x), 1).flatten(1))


class Attention(nn.Module):
    """A small transformer, whose token for the class is repeated for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 5, 16))
        self.norm, self.into, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1) + self.place
        n, length, _ = tokens.shape
        q, k, v = self.into(self.norm(tokens)).reshape(n, length, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        attended = ((q @ k.transpose(-2, -1) / 2).softmax(-1) @ v).transpose(1, 2).reshape(n, length, 16)
        return self.head((tokens + self.out(attended))[:, 0])


def exported(module: nn.Module, side: int, *, dynamo: bool, opset: int, batch: int | None = None) -> bytes:
    """Return a network as PyTorch exports it, for any batch or a fixed one."""
    options: dict[str, Any] = {}
    if batch is None:
        dynamic = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
        options = dynamic if dynamo else {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.randn(batch or 2, 3, side, side),),
            file,
            dynamo=dynamo,
            opset_version=opset,
            verbose=False,
            **options,
        )
    return file.getvalue()


EXPORTS = [(False, 11), (False, 17), (True, 20)]


@pytest.mark.parametrize(("dynamo", "opset"), EXPORTS)
def test_an_exported_network_equals_its_module_and_runs_over_whole_regions(dynamo: bool, opset: int) -> None:
    module = trained(Residual(), 64)
    found = read(exported(module, 64, dynamo=dynamo, opset=opset), side=64)
    images = texture(5, 64, 64)
    torch.testing.assert_close(found(images), module(images), rtol=1e-4, atol=1e-5)
    pixels = texture(1, 128, 192)
    dense = densify(classifier(found, 64), 16, context_px=64)
    same = densify(classifier(module, 64), 16, context_px=64)
    torch.testing.assert_close(scores_of(dense, pixels), scores_of(same, pixels), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dynamo", "opset"), EXPORTS[1:])
def test_an_exported_network_without_padding_gives_the_scores_of_its_windows(dynamo: bool, opset: int) -> None:
    module = trained(inception(), 48)
    found = classifier(read(exported(module, 48, dynamo=dynamo, opset=opset), side=48), 48)
    pixels = texture(1, 64, 80)
    for stride in (8, 4):
        scores = scores_of(densify(found, stride), pixels)[0]
        torch.testing.assert_close(scores, windows_scores(classifier(module, 48), pixels, stride), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dynamo", "opset"), EXPORTS)
def test_an_exported_transformer_equals_its_module_for_any_batch(dynamo: bool, opset: int) -> None:
    module = Attention().eval()
    found = read(exported(module, SIDE, dynamo=dynamo, opset=opset))
    for n in (1, 3):
        images = torch.randn(n, 3, SIDE, SIDE)
        torch.testing.assert_close(found(images), module(images), rtol=1e-4, atol=1e-5)


def test_a_transformer_for_one_image_runs_on_any_batch() -> None:
    module, images = Attention().eval(), torch.randn(3, 3, SIDE, SIDE)
    found = read(exported(module, SIDE, dynamo=False, opset=17, batch=1))
    torch.testing.assert_close(found(images), module(images), rtol=1e-4, atol=1e-5)


def test_a_network_for_one_image_runs_on_any_batch_and_one_for_several_does_not() -> None:
    module, images = trained(Residual(), 64), texture(3, 64, 64)
    found = read(exported(module, 64, dynamo=True, opset=18, batch=1), side=64)
    torch.testing.assert_close(found(images), module(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"written out.*dynamic batch"):
        read(exported(module, 64, dynamo=False, opset=17, batch=2), side=64)


def keras_like(side: Any = 48) -> Any:
    """Return a network as tf2onnx writes those of Keras: images with channels last, and explicit padding."""
    nodes = [
        node("Transpose", "x", outputs=["a"], perm=[0, 3, 1, 2]),
        node("Pad", "a", "pads", outputs=["b"]),
        node("Conv", "b", "w", outputs=["c"], strides=[2, 2]),
        node("BatchNormalization", "c", "one", "zero", "zero", "one", outputs=["d"], epsilon=1e-3),
        node("Clip", "d", "low", "high", outputs=["e"]),
        node("MaxPool", "e", outputs=["f"], kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_UPPER"),
        node("Transpose", "f", outputs=["g"], perm=[0, 2, 3, 1]),
        node("ReduceMean", "g", outputs=["h"], axes=[1, 2], keepdims=0),
        node("MatMul", "h", "m", outputs=["i"]),
        node("Add", "i", "bias", outputs=["j"]),
        node("Softmax", "j", axis=-1),
    ]
    given = {
        "pads": numbers(0, 0, 0, 0, 0, 0, 1, 1),
        "w": weights(8, 3, 3, 3),
        "one": np.ones(8, np.float32),
        "zero": np.zeros(8, np.float32),
        "low": np.float32(0),
        "high": np.float32(6),
        "m": weights(8, 2),
        "bias": weights(2),
    }
    return graph(nodes, given, opset=13, shape=("n", side, side, 3))


def test_a_network_of_keras_takes_images_with_channels_first_and_runs_over_whole_regions() -> None:
    model, images = keras_like(), texture(4, 48, 48)
    found = read(model, side=48)
    (answer,) = expected(model, images.permute(0, 2, 3, 1).contiguous())
    np.testing.assert_allclose(found(images).numpy(), answer, rtol=1e-4, atol=1e-6)
    found = read(keras_like("h"), side=48)
    one = densify(classifier(found, 48), 4)
    whole = classifier(found, 48)
    pixels = texture(1, 64, 80)
    scores = windows_scores(whole, pixels, 4)
    inner = scores_of(one, pixels)[0]
    assert inner.shape == scores.shape
    # Windows see their own padding, which is only that of the region at its lower and right border.
    assert (inner[-1, -1] - scores[-1, -1]).abs() < 1e-5


def test_functions_of_a_file_and_weights_of_sixteen_bits_are_read() -> None:
    body = [helper.make_node("Mul", ["a", "b"], ["c"])]
    function = helper.make_function("own", "Scaled", ["a", "b"], ["c"], body, [helper.make_opsetid("", 17)])
    half = [node("Cast", "x", outputs=["h"], to=onnx.TensorProto.FLOAT16), node("Scaled", "h", "w", domain="own")]
    model = graph(half, {"w": C3.reshape(3, 1, 1).astype(np.float16)})
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.functions.append(function)
    images = torch.randn(2, 3, SIDE, SIDE)
    torch.testing.assert_close(read(model)(images), images * torch.from_numpy(C3).view(3, 1, 1))


# --- files


def test_an_output_is_chosen_by_its_name() -> None:
    flat = [node("GlobalAveragePool", outputs=["a"]), node("Flatten", "a", outputs=["b"])]
    model = graph([*flat, node("MatMul", "b", "w")], {"w": weights(3, 2)}, outputs=["b", "y"])
    images = torch.randn(2, 3, SIDE, SIDE)
    data = model.SerializeToString()
    chosen = network(data, card(output_name="y"), Path("net.onnx"))
    np.testing.assert_allclose(chosen(images).numpy(), expected(model, images)[1], rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match=r"returns 2 outputs \(b \(2, 3\), y \(2, 2\)\)"):
        network(data, card(), Path("net.onnx"))
    assert FORMATS["onnx"].read is onnx_format.read


def test_weights_in_other_files_of_the_folder_are_embedded(tmp_path: Path) -> None:
    """A card whose file leaves them outside is refused, since its hash does not cover them."""
    path, module = tmp_path / "net.onnx", trained(Residual(), 64)
    model = onnx.load_from_string(exported(module, 64, dynamo=False, opset=17))
    onnx.save_model(model, path, save_as_external_data=True, location="net.data", size_threshold=0)
    whole = onnx_format.embedded(path)
    with pytest.raises(InputError, match=r"net.data', which the sha256 of the card does not cover; .* model add FILE"):
        read(path.read_bytes(), path, side=64)
    content = (tmp_path / "net.data").read_bytes()
    (tmp_path / "net.data").write_bytes(content[:-100])
    with pytest.raises(InputError, match=r"net.data ends before the weight"):
        onnx_format.embedded(path)
    (tmp_path / "net.data").unlink()
    images = texture(2, 64, 64)
    torch.testing.assert_close(read(whole, path, side=64)(images), module(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"weights of the network are in net.data, which cannot be read; put net.data"):
        onnx_format.embedded(path)


@pytest.mark.parametrize("name", ["../w", "/etc/hostname", "sub/w", ".."])
def test_weights_outside_of_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    model = graph([node("Add", "x", "w")], {"w": weights(3, 1, 1)})
    (weight,) = model.graph.initializer
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=name)
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="which is not a plain file name"):
        onnx_format.embedded(tmp_path / "net.onnx")


def with_input(model: Any, *, shape: Sequence[Any] | None = None, kind: int = FLOAT, second: bool = False) -> Any:
    """Return a graph whose input has another shape or type, or that has two."""
    image = helper.make_tensor_value_info("x", kind, list(shape or ("n", 3, SIDE, SIDE)))
    model.graph.input[0].CopyFrom(image)
    if second:
        model.graph.input.append(helper.make_tensor_value_info("mask", FLOAT, ["n", 1]))
    return model


def relu(**fields: Any) -> Any:
    return with_input(graph([node("Relu")]), **fields)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (relu(second=True), r"the network has 2 inputs \('x', 'mask'\); export one that takes images alone"),
        (relu(kind=onnx.TensorProto.UINT8), r"takes uint8 numbers as 'x'; export one that takes float32"),
        (relu(shape=("n", 1, SIDE, SIDE)), r"has the shape \['n', 1, 16, 16\]; export a network that takes \(n, 3"),
        (relu(shape=("n", 3)), r"has the shape \['n', 3\]; export a network that takes \(n, 3"),
        (relu(shape=("n", 3, 32, 32)), r"has the shape \['n', 3, 32, 32\], and input_px is 16; correct input_px"),
        (graph([node("NonZero")]), r"operator NonZero \(node 'my_NonZero'\) of opset 17 is not known; export"),
        (graph([node("ArgMax", axis=1)]), r"operator ArgMax .* returns which class is the likeliest"),
        (graph([node("Relu", domain="com.x")]), r"operator com.x.Relu \(node 'my_Relu'\) of opset 17 is not known"),
        (graph([node("Relu", strange=1)]), r"operator Relu .* has the attribute strange, which is not known"),
        (graph([node("Relu", "z")]), r"operator Relu .* takes 'z', which nothing returns; fetch or export"),
        (graph([node("Conv", "x", "w")], {"w": weights(4, 5, 3, 3)}), r"operator Conv .* cannot be run: .*channel"),
        (graph([node("Reshape", "x", "s")], {"s": numbers(2, -1)}), r"has the number of images written out: \[2, -1\]"),
        (graph([node("Shape", outputs=["s"]), node("Gather", "s", "i", outputs=["g"]), node("Cast", "g", outputs=["c"],
            to=1), node("Div", "x", "c")], {"i": np.int64(0)}), r"run: it computes with the number of images"),
        (relu().SerializeToString()[:-30], r"the file (is truncated or not ONNX|holds no network, or is truncated)"),
        (b"", "the file holds no network, or is truncated; fetch or export the file again"),
        (b"\x80 no ONNX at all", "the file is truncated or not ONNX; fetch or export the file again"),
    ],
)  # fmt: skip
def test_a_network_that_cannot_be_run_is_refused_with_the_remedy(model: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        read(model)
    assert str(refusal.value).startswith("net.onnx: ")
    assert "\n" not in str(refusal.value)


def test_a_network_for_one_image_that_mixes_images_is_refused() -> None:
    mixed = [node("ReduceMean", outputs=["m"], axes=[0], keepdims=1), node("Mul", "x", "m")]
    with pytest.raises(InputError, match=r"only runs on batches of 1; export it with a dynamic batch"):
        read(with_input(graph(mixed), shape=(1, 3, SIDE, SIDE)))
