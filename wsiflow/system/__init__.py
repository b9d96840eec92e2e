"""The system beneath a run: published files and their receipts, tables, this machine, its processes and their usage."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from wsiflow.system.provenance import facts
    from wsiflow.system.publish import Receipt, done, publishing, read_receipt
    from wsiflow.system.usage import Meter

__all__ = ["Meter", "Receipt", "done", "facts", "publishing", "read_receipt"]

# Each module is imported when a name of it is first used, because most commands need few of them.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "provenance": ["facts"],
        "publish": ["Receipt", "done", "publishing", "read_receipt"],
        "usage": ["Meter"],
    },
)
