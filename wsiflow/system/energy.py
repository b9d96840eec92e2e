"""What this machine's processors and memory used, from the counters that Linux shows of RAPL.

``/sys/class/powercap`` has a folder for each domain: ``name``, ``energy_uj`` (microjoules so far) and
``max_energy_range_uj``, after which the counter begins again at 0. The processors are the domains ``package-*``;
memory, ``dram``, is counted beside its package and not in it; other domains lie within a package or hold all of the
board.

The counters are of the whole machine, whoever else works on it. Most systems let only root read them.
"""

import threading
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
_LOOK_S = 30.0  # a counter of 262 kJ begins again after ten minutes at 400 W


class EnergyMeter:
    """Counts from the moment it is made, in a thread that sees every counter begin again."""

    def __init__(self, powercap: Path = POWERCAP, *, look_s: float = _LOOK_S) -> None:
        """Start counting, where every counter there is can be read."""
        self._lock, self._stop, self._microjoules = threading.Lock(), threading.Event(), 0
        try:
            self._last = {folder: _number(folder / "energy_uj") for folder in _domains(powercap)}
        except (OSError, ValueError):  # readable by root alone
            self._last = {}
        if self._last:
            threading.Thread(target=self._watch, args=(look_s,), daemon=True).start()

    def joules(self) -> float | None:
        """Stop, and return the joules since the start; None where there is no counter."""
        if not self._last:
            return None
        self._stop.set()
        try:
            self._look()
        except (OSError, ValueError):
            return None
        return self._microjoules / 1e6

    def _watch(self, look_s: float) -> None:
        while not self._stop.wait(look_s):
            try:
                self._look()
            except (OSError, ValueError):
                return  # `joules` meets it again

    def _look(self) -> None:
        """Add what was used since the last look."""
        with self._lock:
            for folder, before in self._last.items():
                now = _number(folder / "energy_uj")
                begun_again = _number(folder / "max_energy_range_uj") if now < before else 0
                self._microjoules += now - before + begun_again
                self._last[folder] = now


def _domains(powercap: Path) -> list[Path]:
    """Return the folders of processors and memory; ``intel-rapl-mmio`` shows the same counters again."""
    found = sorted(powercap.glob("intel-rapl:*"))
    return [folder for folder in found if (folder / "name").read_text().strip().startswith(("package", "dram"))]


def _number(path: Path) -> int:
    return int(path.read_text())
