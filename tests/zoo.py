"""Networks of timm, torchvision and transformers, from the folder that ``tests/install_zoo.sh`` fills."""

import sys
from pathlib import Path

import pytest
from torch import library as operators

FOLDER = Path(sys.prefix) / "zoo"
_OPERATORS = ("nms", "qnms")
_registered: list[operators.Library] = []  # as long as the process, since they end with their object


def require() -> None:
    """Make these libraries importable; skip the test where they are not installed.

    The compiled part of torchvision belongs to another build of PyTorch, and is not loaded here. It holds operators of
    object detection, whose names torchvision asks for when it is imported; no classifier uses them.
    """
    if not FOLDER.is_dir():
        pytest.skip("timm, torchvision and transformers are not installed: tests/install_zoo.sh")
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
        stub = operators.Library("torchvision", "DEF")
        for name in _OPERATORS:
            stub.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _registered.append(stub)
