"""The operators of ONNX, each as a function that builds the same from functions of PyTorch.

Input: an `Operation`, one node with its inputs. Output: its result, or several in a tuple. An operator, an attribute or
a mode that is not here is refused, since a wrong assumption would give scores that look right, but are not.
"""

from collections.abc import Sequence

from wsiflow.model.formats.onnx import layers, shapes
from wsiflow.model.formats.onnx.graph import DYNAMIC_BATCH, NodeFields, Translation, Value, readable
from wsiflow.model.formats.onnx.operation import EXPORT_AGAIN, Operation

_WITHOUT = "export the model without it, or from PyTorch with opset_version=17"
_FAULTS = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)


def translate(translation: Translation, fields: NodeFields, inputs: Sequence[Value]) -> tuple[Value, ...]:
    """Return the results of a node.

    Args:
        translation: The graph under translation.
        fields: The node.
        inputs: Its inputs; None for those that are not given.

    Raises:
        InputError: The operator is not known, or is used in a way that is not known.
    """
    if fields.kind not in _OPERATORS:
        reason = _REFUSED.get(fields.kind, "is not known")
        raise fields.fault(f"of opset {translation.opset} {reason}", _WITHOUT)
    operation = Operation(translation, fields, inputs)
    try:
        results = _OPERATORS[fields.kind](operation)
    except _FAULTS as error:
        reason = _first_line(error)
        raise operation.refuse(
            f"cannot be run: {reason}", DYNAMIC_BATCH if "batch" in reason else EXPORT_AGAIN
        ) from error
    operation.check_attributes()
    return results if isinstance(results, tuple) else (results,)


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, with the batch by its name."""
    return readable((str(error).splitlines() or [type(error).__name__])[0])[:200]


_OPERATORS = {**layers.OPERATORS, **shapes.OPERATORS}
_CONTROL_FLOW = "is control flow, which has no layers"
_QUANTISED = "computes with quantised numbers"
_REFUSED: dict[str, str] = {
    **dict.fromkeys(("ArgMax", "ArgMin", "TopK"), "returns which class is the likeliest instead of probabilities"),
    **dict.fromkeys(("If", "Loop", "Scan"), _CONTROL_FLOW),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv"), _QUANTISED),
}
