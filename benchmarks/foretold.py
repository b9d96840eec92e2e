"""Check whether a run costs what `wsiflow plan --calibrate` says, on slides, strides and networks of many kinds.

Every case has slides of its own. Its run is foretold and then done, in core-seconds of its tasks; the costs that are
measured on a few blocks say what the whole of the slides will take. The table tells how far runs lie from the
estimate, and whether the range that is told holds them. CPU seconds depend on what else the machine does meanwhile.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import networks, product
from benchmarks.core_hours import foretold, spent
from benchmarks.measuring import ResultTable, arguments, finish, machine, say


class Case(NamedTuple):
    """A run: its network, its settings, and the sides of its slides, px."""

    network: str
    settings: tuple[str, ...]
    sides_px: tuple[int, ...]

    @property
    def name(self) -> str:
        """What is special of it, for the table."""
        keys = [setting.rpartition(".")[2] for setting in self.settings]
        return ", ".join([self.network, *keys, f"{len(self.sides_px)} slides of {max(self.sides_px)} px"])


_CASES = (
    Case("demo", ("inference.stride=16",), (4096, 3072)),
    Case("demo", ("inference.stride=56", "store.kind=hdf5"), (4096,)),
    Case("demo", ("inference.stride=32", "inference.precision=bf16"), (3072, 3072, 3072)),
    Case("pcam", ("inference.stride=32", "stain=macenko"), (6144,)),
    Case("inception_valid", ("inference.stride=32",), (4096,)),
    Case("demo", ("inference.stride=112", "inference=window"), (3072,)),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Foretell and do every run, and write ``foretold.json``."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--seed", type=int, default=100, help="of the first slide")
    given = parser.parse_args(argv)
    cases, about, values = _CASES[:1] if given.quick else _CASES, machine(), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["WSIFLOW_CACHE"] = str(folder / "cache")
        for number, case in enumerate(cases):
            say(case.name)
            values[case.name] = _compared(folder / str(number), case, given.seed + 10 * number)
    finish(given, "foretold", about, values, [_table(values)])


def _compared(folder: Path, case: Case, seed: int) -> dict[str, Any]:
    """Write slides, foretell the run over them, do it, and return both in core-seconds."""
    folder.mkdir()
    slides = [
        product.write_slide(folder / f"{index}.tif", side, seed=seed + index)
        for index, side in enumerate(case.sides_px)
    ]
    card = f"pkg:{case.network}.json"
    if case.network not in {"demo", "pcam"}:
        card = str(networks.random_card(case.network, folder))
    settings = ["model=card", f"model.card={card}", "dataset=manifest", "executor=inline", "dense.on_excess=report"]
    settings += [f"dataset.manifest={product.write_manifest(folder, slides)}", *case.settings]
    if not any(setting.startswith("store") for setting in case.settings):
        settings.append("store=none")
    told = foretold(folder / "run", settings)
    product.run_command(folder / "run", *settings)
    return told | {"spent_s": spent(folder / "run")["tasks_s"]}


def _table(values: Mapping[str, Mapping[str, Any]]) -> ResultTable:
    rows = []
    for name, each in values.items():
        least, most = each["foretold_between_s"]
        cells = [f"{each['foretold_s']:.1f}", f"{least:.1f} to {most:.1f}", f"{each['spent_s']:.1f}"]
        inside = least <= each["spent_s"] <= most
        rows.append([name, *cells, f"{each['spent_s'] / each['foretold_s'] - 1:+.0%}", "yes" if inside else "**no**"])
    columns = [
        "",
        "foretold, core-s",
        "its range",
        "the run, core-s",
        "the run against the estimate",
        "within the range",
    ]
    return ResultTable(
        "Core-seconds foretold by wsiflow plan --calibrate and spent, on slides of many kinds", columns, rows
    )


if __name__ == "__main__":
    main()
