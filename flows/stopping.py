"""How a command is stopped: Ctrl-C and SIGTERM end it within seconds, whatever its threads are at.

The command runs in a thread, and the main thread does nothing but listen: no library's handler and no long call into C
can keep a signal from it. Every thread of the command blocks SIGINT, and every process they start inherits that: what a
terminal sends to all of them is heard here alone. At the first signal nothing more is said but one line, what was
registered with `at_stop` is called, every process that descends from this one is killed, and this one leaves: to what
is on the disk it is as if it had been killed, and that is what a start after it copes with. At the second signal it
leaves at once.
"""

import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

#: How a line ends where a start after this one does what is missing.
GOES_ON = "the same command goes on"

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Together less than the five seconds in which a run is to end.
_CLEANING_S = 2.0
_KILLING_S = 1.0
_COUNTING_S = 0.8
_SAYING_S = 0.5  # a pipe that nobody reads may be full
_LOOK_S = 0.02

_cleanings: list[Callable[[], str | None]] = []
_tellers: list[Callable[[], str]] = []


class _State:
    """What the handler of signals and the rest of this module know of each other."""

    heard: "_Heard | None" = None  # what the main thread waits for, while it listens
    stopping = False
    stderr = 2  # where the one line goes
    said = False


class _Ended(NamedTuple):
    """How the command ended by itself."""

    exit_code: int
    error: BaseException | None


#: How the command ended, the number of a signal, or what the main thread is to call.
_Heard = queue.SimpleQueue[_Ended | int | Callable[[], None]]


def run(command: Callable[[], int]) -> int:
    """Call a command and return its exit code; does not return where a signal ends it."""
    if threading.current_thread() is not threading.main_thread():
        return command()  # only the main thread hears signals
    heard: _Heard = queue.SimpleQueue()

    def body() -> None:
        _block()
        ended = _called(command)
        hold()
        heard.put(ended)

    with _listening(heard):
        threading.Thread(target=body, name="command", daemon=True).start()
        while callable(ended := heard.get()):
            ended()
        if isinstance(ended, int):
            _end(ended)
    if ended.error is not None:
        raise ended.error
    return ended.exit_code


def in_main_thread(call: Callable[[], object]) -> None:
    """Call a function in the thread that listens, and keep this module's handlers of signals.

    Some libraries set handlers while they are imported (dask-jobqueue does), which only the main thread may.

    Raises:
        Exception: Whatever the function raises.
    """
    if _State.heard is None:
        call()
        return
    answer: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    _State.heard.put(lambda: answer.put(_raised(call)))
    if (error := answer.get()) is not None:
        raise error


def _raised(call: Callable[[], object]) -> BaseException | None:
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        call()
    except BaseException as error:  # noqa: BLE001 - raised again in the thread that asked
        return error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return None


def _called(command: Callable[[], int]) -> _Ended:
    try:
        return _Ended(command(), None)
    except BaseException as error:  # noqa: BLE001 - raised again in the main thread
        return _Ended(0, error)


@contextlib.contextmanager
def at_stop(clean: Callable[[], str | None]) -> Iterator[None]:
    """Have a function called if a signal comes during the body.

    Args:
        clean: Ends what the body uses, from another thread and beside other such functions; has two seconds. Returns
            what is to be told of it, or nothing.
    """
    _cleanings.append(clean)
    try:
        yield
    finally:
        _cleanings.remove(clean)


@contextlib.contextmanager
def telling(sentence: Callable[[], str]) -> Iterator[None]:
    """Name who says how far the command came, if a signal comes during the body; the outermost one is asked."""
    _tellers.append(sentence)
    try:
        yield
    finally:
        _tellers.remove(sentence)


def shield() -> None:
    """See that worker processes do not hear the terminal's SIGINT, before the first of them is started.

    The process with which multiprocessing keeps track of its resources is started by the first thread that needs it,
    and that thread's signals are unblocked in the course of it.
    """
    resource_tracker.ensure_running()
    if _State.heard is not None:
        _block()


def _block() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def hold() -> None:
    """Keep a thread from going on once the command is being stopped: what it would do or say is of the stopping."""
    if _State.stopping:
        threading.Event().wait()


def kill_descendants() -> None:
    """Kill every process that this one started, and those that they started, until none is left."""
    end = time.monotonic() + _KILLING_S
    while (alive := _descendants()) and time.monotonic() < end:
        for pid in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK_S)


@contextlib.contextmanager
def _listening(heard: _Heard) -> Iterator[None]:
    """Put signals into the queue; those that whoever started this wants ignored, as ``nohup`` does, stay ignored."""

    def hear(number: int, _frame: FrameType | None) -> None:
        if _State.stopping:
            _leave(number, _line("stopped at once", goes_on=bool(_tellers)))
        _State.stopping = True
        heard.put(number)

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, hear)
    _State.heard = heard
    try:
        yield
    finally:
        _State.heard = None
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int) -> NoReturn:
    """End the command after a first signal."""
    _mute()
    tellers = _tellers[:1]  # what is cleaned up ends their bodies
    told = _within(_CLEANING_S, _cleanings[::-1])
    kill_descendants()
    told[:0] = _within(_COUNTING_S, tellers)
    _leave(number, _line(f"stopped: {', '.join(told)}" if told else "stopped", goes_on=bool(tellers)))


def _line(text: str, *, goes_on: bool) -> str:
    return f"{text}; {GOES_ON}" if goes_on else text


def _mute() -> None:
    """Let nobody but `_leave` say anything more: what libraries and threads tell now is of the stopping alone."""
    _State.stderr = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def _within(seconds: float, calls: Sequence[Callable[[], str | None]]) -> list[str]:
    """Call functions side by side and return what those say that come to an end in time; the others are left alone."""
    said: list[str | None] = []
    threads = [threading.Thread(target=lambda call=call: said.append(call()), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return [sentence for sentence in said if sentence]


def _leave(number: int, line: str) -> NoReturn:
    """Leave without another word of anybody: threads in the middle of a prediction cannot be waited for."""
    kill_descendants()
    if not _State.said:
        _State.said = True
        _within(_SAYING_S, [lambda: _say(number, line)])
    os._exit(128 + number)


def _say(number: int, line: str) -> str:
    begin = "\n" if os.isatty(_State.stderr) and number == signal.SIGINT else ""  # behind the ^C that terminals show
    os.write(_State.stderr, f"{begin}{line}\n".encode())
    return line


def _descendants() -> list[int]:
    """Return the processes that descend from this one and have not ended."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                stat = (folder / "stat").read_text(encoding="utf-8", errors="replace")
                state, parent = stat.rpartition(")")[2].split()[:2]  # the name before it may hold anything
                if state != "Z":
                    parents[int(folder.name)] = int(parent)
    found = [os.getpid()]
    for pid in found:  # grows while it is walked through
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]
