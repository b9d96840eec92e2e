"""ONNX, which holds a network with its weights as a graph of operators, and no code.

`reader` takes the file apart, `operators` translates a node, by the tables in `layers` and `shapes`, and `graph` is the
network that grows from the results. The name is not that of the distribution ``onnx``: imports are absolute.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from wsiflow.model.formats.onnx.reader import FORMAT, embedded, read

__all__ = ["FORMAT", "embedded", "read"]

# Loaded when they are first used, so that the modules of the package can be imported one by one.
__getattr__, __dir__, _ = lazy_loader.attach(__name__, submod_attrs={"reader": ["FORMAT", "embedded", "read"]})
