"""The energy that the processors and the memory of this machine used, measured by RAPL counters on Linux.

``/sys/class/powercap`` has a folder for each RAPL domain with the files ``name``, ``energy_uj`` (microjoules counted so
far) and ``max_energy_range_uj``, the value at which the counter wraps to 0. The domains ``package-*`` are the
processors. The domain ``dram`` is the memory, which is not included in its package. All other domains are part of a
package or cover the whole board, so they are not added.

The counters cover the whole machine, whoever else works on it. Most systems let only root read them.
"""

import threading
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
_POLL_S = 30.0  # a counter of 262 kJ wraps after ten minutes at 400 W


class EnergyMeter:
    """Measures the energy used since it was created; a thread polls the counters so that no wrap is missed."""

    def __init__(self, powercap: Path = POWERCAP, *, poll_s: float = _POLL_S) -> None:
        """Start the measurement; there is none where a counter cannot be read.

        Args:
            powercap: Folder of the RAPL domains.
            poll_s: Seconds between two readings of the counters.
        """
        self._lock, self._stop, self._microjoules = threading.Lock(), threading.Event(), 0
        try:
            self._last = {folder: _number(folder / "energy_uj") for folder in _domains(powercap)}
        except (OSError, ValueError):  # only root may read it
            self._last = {}
        if self._last:
            threading.Thread(target=self._poll, args=(poll_s,), daemon=True).start()

    def joules(self) -> float | None:
        """Stop the measurement and return the joules used since its start, or None where they cannot be measured."""
        if not self._last:
            return None
        self._stop.set()
        try:
            self._read()
        except (OSError, ValueError):
            return None
        return self._microjoules / 1e6

    def _poll(self, poll_s: float) -> None:
        while not self._stop.wait(poll_s):
            try:
                self._read()
            except (OSError, ValueError):
                return  # `joules` meets the same error

    def _read(self) -> None:
        """Add the energy used since the last reading."""
        with self._lock:
            for folder, before in self._last.items():
                now = _number(folder / "energy_uj")
                wrapped = _number(folder / "max_energy_range_uj") if now < before else 0
                self._microjoules += now - before + wrapped
                self._last[folder] = now


def _domains(powercap: Path) -> list[Path]:
    """Return the folders of the processors and the memory; ``intel-rapl-mmio`` repeats these counters."""
    folders = sorted(powercap.glob("intel-rapl:*"))
    return [folder for folder in folders if (folder / "name").read_text().strip().startswith(("package", "dram"))]


def _number(path: Path) -> int:
    return int(path.read_text())
