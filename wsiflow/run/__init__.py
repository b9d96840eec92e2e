"""One run: from a configuration to files with receipts."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from wsiflow.run import store
    from wsiflow.run.config import RunConfig
    from wsiflow.run.plan import Plan, Task
    from wsiflow.run.results.finish import Summary, finish
    from wsiflow.run.shards import begin, line

__all__ = ["Plan", "RunConfig", "Summary", "Task", "begin", "finish", "line", "store"]

# Loaded when they are first used: most commands need few of them.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submodules=["store"],
    submod_attrs={
        "config": ["RunConfig"],
        "plan": ["Plan", "Task"],
        "results.finish": ["Summary", "finish"],
        "shards": ["begin", "line"],
    },
)
