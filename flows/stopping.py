"""Stop a command: Ctrl-C and SIGTERM end it within seconds, whatever its threads are doing.

The command runs in a thread, and the main thread only waits for signals: no library's handler and no long call into C
can keep a signal from it. Every thread of the command blocks SIGINT, and every process that it starts inherits that, so
that a signal which a terminal sends to all of them reaches the main thread alone. At the first signal everything but
one last line is silenced, the functions that were registered with `at_stop` are called, every descendant of this
process is killed, and this process exits. To the files on the disk this is the same as if it had been killed, and a
later start resumes from them. At the second signal the process exits at once; the line then names what is left to do.
"""

import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from types import FrameType
from typing import NamedTuple, NoReturn

from wsiflow.system import processes

#: End of the last line where the same command does what is missing.
GOES_ON = "the same command goes on"

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Their sum is below the five seconds in which a run has to end.
_CLEANING_S = 2.0
_ENDING_S = 0.5  # of what the others may use while they clean up
_KILLING_S = 1.0
_COUNTING_S = 0.8
_PRINTING_S = 0.5  # a pipe that nobody reads may be full
_PAUSE_S = 0.02

_cleanings: list["_Cleaning"] = []
_endings: list["_Cleaning"] = []
_summaries: list[Callable[[], str]] = []


class _State:
    """State that the handler of signals shares with the rest of this module."""

    heard: "_Heard | None" = None  # the queue that the main thread reads, while it listens
    stopping = False
    stderr = 2  # file descriptor to which the last line is printed
    printed = False
    abandoned = False  # whether threads of libraries are left, for which no exit may wait


class _Cleaning:
    """A function that ends what a command uses, and what is to be said where it could not end that."""

    def __init__(self, clean: Callable[[], str | None], unfinished: str) -> None:
        self._clean, self.unfinished = clean, unfinished

    def __call__(self) -> str | None:
        sentence = self._clean()
        self.unfinished = ""
        return sentence


class _Ended(NamedTuple):
    """How the command ended without a signal."""

    exit_code: int
    error: BaseException | None


#: Queue of how the command ended, of numbers of signals, and of functions that the main thread has to call.
_Heard = queue.SimpleQueue[_Ended | int | Callable[[], None]]


def run(command: Callable[[], int]) -> int:
    """Call a command and return its exit code; this function does not return where a signal ends the command."""
    if threading.current_thread() is not threading.main_thread():
        return command()  # only the main thread receives signals
    heard: _Heard = queue.SimpleQueue()

    def body() -> None:
        _block()
        ended = _end_of(command)
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
    """Call a function in the main thread, and keep this module's handlers of signals.

    Some libraries, such as dask-jobqueue, set handlers while they are imported, which only the main thread may do.

    Raises:
        Exception: Whatever the function raises.
    """
    if _State.heard is None:
        call()
        return
    result: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    _State.heard.put(lambda: result.put(_exception_of(call)))
    if (error := result.get()) is not None:
        raise error


def _exception_of(call: Callable[[], object]) -> BaseException | None:
    """Call a function with the present handlers of signals kept, and return the exception that it raises."""
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        call()
    except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
        return error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return None


def _end_of(command: Callable[[], int]) -> _Ended:
    try:
        return _Ended(command(), None)
    except BaseException as error:  # noqa: BLE001 - raised again in the main thread
        return _Ended(0, error)


@contextlib.contextmanager
def at_stop(clean: Callable[[], str | None], *, last: bool = False, unfinished: str = "") -> Iterator[None]:
    """Have a function called if a signal comes during the body.

    Args:
        clean: Ends what the body uses within two seconds. It is called from another thread, at the same time as other
            such functions, and returns words for the last line, or None.
        last: Whether it is called after the others, for half a second, since they use what it ends.
        unfinished: Words for the last line where it takes longer than that, or a second signal comes first.
    """
    registered, cleaning = _endings if last else _cleanings, _Cleaning(clean, unfinished)
    registered.append(cleaning)
    try:
        yield
    finally:
        registered.remove(cleaning)


@contextlib.contextmanager
def reporting(sentence: Callable[[], str]) -> Iterator[None]:
    """Register a function that says, if a signal comes, how far the command came; the outermost one is called."""
    _summaries.append(sentence)
    try:
        yield
    finally:
        _summaries.remove(sentence)


def shield() -> None:
    """Keep SIGINT from worker processes; this is called before the first of them is started.

    The first thread that needs multiprocessing's resource tracker starts that process, and has its signals unblocked in
    the course of it.
    """
    resource_tracker.ensure_running()
    if _State.heard is not None:
        _block()


def _block() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def hold() -> None:
    """Hold the calling thread for good once the command is being stopped, since that causes all it would report."""
    if _State.stopping:
        threading.Event().wait()


def abandon_threads() -> None:
    """Have the process exit at the end of the command without waiting for threads, which may wait for minutes."""
    _State.abandoned = True


def exit_if_abandoned(exit_code: int) -> None:
    """Exit at once, as the interpreter would not, where threads were abandoned."""
    if _State.abandoned:
        kill_descendants()
        os._exit(exit_code)


def kill_descendants() -> None:
    """Kill every process that this one started, and those that they started, until none is left."""
    end = time.monotonic() + _KILLING_S
    while (alive := processes.descendants()) and time.monotonic() < end:
        for pid in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_PAUSE_S)


@contextlib.contextmanager
def _listening(heard: _Heard) -> Iterator[None]:
    """Put signals into the queue; those that were ignored from the start, as under ``nohup``, stay ignored."""

    def hear(number: int, _frame: FrameType | None) -> None:
        if _State.stopping:
            _leave(number, _line(", ".join(["stopped at once", *_unfinished()]), goes_on=bool(_summaries)))
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
    _silence()
    summaries = _summaries[:1]  # cleaning up ends the bodies for which they are registered
    sentences = _within(_CLEANING_S, _cleanings[::-1])
    sentences += _within(_ENDING_S, _endings[::-1])
    sentences += _unfinished()
    kill_descendants()
    sentences[:0] = _within(_COUNTING_S, summaries)
    _leave(number, _line(f"stopped: {', '.join(sentences)}" if sentences else "stopped", goes_on=bool(summaries)))


def _unfinished() -> list[str]:
    """Return what is to be said of what has not been ended yet."""
    return [one.unfinished for one in (*_cleanings, *_endings) if one.unfinished]


def _line(text: str, *, goes_on: bool) -> str:
    return f"{text}; {GOES_ON}" if goes_on else text


def _silence() -> None:
    """Silence everything but `_leave`: whatever libraries and threads print now, the stop is the cause of it."""
    _State.stderr = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def _within(seconds: float, calls: Sequence[Callable[[], str | None]]) -> list[str]:
    """Call functions at the same time, and return the sentences of those that end in time."""
    results: list[str | None] = []
    threads = [threading.Thread(target=lambda call=call: results.append(call()), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return [sentence for sentence in results if sentence]


def _leave(number: int, line: str) -> NoReturn:
    """Print the last line and exit, without waiting for threads in the middle of a prediction."""
    kill_descendants()
    if not _State.printed:
        _State.printed = True
        _within(_PRINTING_S, [lambda: _print(number, line)])
    os._exit(128 + number)


def _print(number: int, line: str) -> str:
    begin = "\n" if os.isatty(_State.stderr) and number == signal.SIGINT else ""  # behind the ^C that terminals show
    os.write(_State.stderr, f"{begin}{line}\n".encode())
    return line
