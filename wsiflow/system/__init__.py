"""What lies under a run: published files and their receipts, tables, this machine, its processes and what they use."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from wsiflow.system.provenance import facts
    from wsiflow.system.publish import Receipt, done, publishing, read_receipt
    from wsiflow.system.usage import Meter

__all__ = ["Meter", "Receipt", "done", "facts", "publishing", "read_receipt"]

# Loaded by whoever asks first: most commands need little of it.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "provenance": ["facts"],
        "publish": ["Receipt", "done", "publishing", "read_receipt"],
        "usage": ["Meter"],
    },
)
