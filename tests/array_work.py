"""Work for elements of array jobs in tests: quick tasks, which misbehave once each as the source says."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from wsiflow.errors import EnvironmentFault
from wsiflow.run.executor.protocol import Outcome


def work(source: Path, stage: str, lo: int, hi: int) -> Iterator[Outcome]:
    """Do the tasks of a slice.

    In the source, ``exit`` gives exit codes by task, with which the process ends there. ``wait`` lists tasks that wait
    until a file ``go`` exists, and ``starve`` tasks that fail for lack of memory. ``environ`` names environment
    variables whose values are in the receipts.
    """
    behaviour = json.loads(source.read_text())
    for task in range(lo, hi):
        first = not (source.parent / f"{stage}-{task}").exists()
        (source.parent / f"{stage}-{task}").touch()
        if first and str(task) in behaviour.get("exit", {}):
            os._exit(behaviour["exit"][str(task)])
        while first and task in behaviour.get("wait", ()) and not (source.parent / "go").exists():
            time.sleep(0.1)
        if first and task in behaviour.get("starve", ()):
            failure = EnvironmentFault("failed to map segment", "free memory").failure
            yield Outcome(task, None, executed=True, failure=failure, usage={"exit_class": "memory"})
            continue
        seen = {name: os.environ.get(name) for name in behaviour.get("environ", ())}
        yield Outcome(task, {"square": task**2, "first": first, "environ": seen}, executed=True)


def drive(params: str, root: str, count: str) -> None:
    """Run ``count`` tasks, as the main function of a driver process that a test may kill.

    The file ``driver-<pid>`` says that it knows what an earlier driver left in the queue.
    """
    from wsiflow.run.executor import make
    from wsiflow.run.executor.params import ExecutorParams
    from wsiflow.run.executor.protocol import Slice

    source = Path(root) / "plan.json"
    slices = [Slice(lo, min(lo + 2, int(count))) for lo in range(0, int(count), 2)]
    with make(ExecutorParams.model_validate_json(params), cores=1, root=Path(root)) as pool:
        (source.parent / f"driver-{os.getpid()}").touch()
        ended = {outcome.task for outcome in pool.run(work, source, "predict", slices)}
    (Path(root) / "ended").write_text(json.dumps(sorted(ended)))
