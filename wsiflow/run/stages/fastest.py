"""Choose how a run computes scores: engine, backend, precision, halo and the largest block.

Input: the classifier and the configuration. Output: a `Choice` and its reason. Whether the network can run over whole
blocks, and how much context and memory it needs, is computed from its graph. The fastest backend is measured on the
machine, and only where the configuration says ``auto``.
"""

import contextlib
import math
import time
from typing import Any

import numpy as np

from wsiflow.errors import InputError
from wsiflow.model import scorer, scoring
from wsiflow.model.choice import Choice
from wsiflow.model.classifier import Classifier
from wsiflow.model.dense.facts import DenseFacts
from wsiflow.model.engines import engine, openvino, spec
from wsiflow.plan import geometry
from wsiflow.run.config import RunConfig
from wsiflow.system.machine import cpu_flags
from wsiflow.system.usage import untimed

_Scorer = scoring.WindowScorer | scoring.DenseScorer

_MICRO_BENCHMARK_S = 2.0
_ONE_BY_ONE = "windows are run one by one"

# What allocators and scratch memory add to the activations that the graph counts: GoogLeNet's are 80 bytes per pixel,
# and a worker grows by 193 (fp32) for each pixel more in a block.
_MEMORY_FACTOR = 2.4
_FLAGS = ("amx", "asimd", "avx", "fma", "sve")  # they decide how fast a precision is
_WIDEST_STEP_PX = 16  # context is a multiple of the map's spacing, which differs from stride to stride
_MOST_SHARED = 0.99
_LEAST_SAVED = 0.1  # of a window's multiplications; less does not pay for the windows' copies of the shared map
_MOST_COLS = 12  # longer strips save hardly any halo, and a group should hold several strips
# Activations of networks in a call with several windows, per pixel of their input: those of VGG, which has the largest
# maps. The default memory_mb lets 32 windows of 224 px run in one call, and one of 1024 px.
_CALL_BYTES_PX = 512.0
_WINDOW_BYTES_PX = 200.0  # windows hold only pixels, and reading more at once gains nothing


def choose_engine(classifier: Classifier, config: RunConfig, *, threads: int, keep_as: str = "") -> dict[str, Any]:
    """Choose how a run computes scores.

    Args:
        classifier: The network.
        config: The configuration.
        threads: Number of threads with which the network runs.
        keep_as: What identifies the network in the cache folder, see `wsiflow.model.scorer.make_scorer`.

    Returns:
        JSON values by name: the choice, its reason (``told``), the seconds that were measured, the flags of the CPU,
        and the layers that ``dense.share_until`` may name (``cuts``).

    Raises:
        InputError: The configuration asks for what this network cannot do.
        EnvironmentFault: The configuration asks for what this machine cannot do.
    """
    facts, reason = _graph(classifier, config)
    try:
        planned = _plan_blocks(classifier, config, facts) if facts else _plan_windows(classifier, config)
    except _NoRegionsError as error:
        facts, reason = None, f"{_ONE_BY_ONE}: {error}"
        planned = _plan_windows(classifier, config)
    choice, measured = _fastest(classifier, planned, config, threads=threads)
    try:
        proven = _prove(classifier, choice, threads=threads, keep_as=keep_as)
    except InputError as error:
        if choice.engine == "window" or config.dense.share_until or choice.precision == "int8":
            raise
        facts, reason = None, f"{_ONE_BY_ONE}: {error.cause}"
        alone = _plan_windows(classifier, config)
        choice = alone._replace(backend=choice.backend, precision=choice.precision)
        proven = _prove(classifier, choice, threads=threads, keep_as=keep_as)
    _check_certifiable(choice, config)
    if not engine.is_convertible(classifier):
        reason = f"{reason}; PyTorch runs this network"
    if choice.stride_px != config.inference.stride:
        apart = f"{_ONE_BY_ONE}, {choice.stride_px} px apart (inference.stride_alone)"
        reason = reason.replace(_ONE_BY_ONE, apart, 1)
    return {
        "choice": choice.values(),
        "told": f"{reason}{_smaller_batch(choice, config)}",
        "measured_s": measured,
        "cpu_flags": sorted(flag for flag in cpu_flags() if flag.startswith(_FLAGS)),
        "cuts": _cuts(facts),
        **_cost_alone(classifier, choice, config, proven, threads=threads),
    }


def _stride_alone(classifier: Classifier, config: RunConfig) -> int:
    """Return the stride that fits windows which run one by one: half a window, or less to divide a tile."""
    tile_px = config.tiles.tile_px
    return max(
        stride for stride in range(1, tile_px + 1) if tile_px % stride == 0 and 2 * stride <= classifier.window_px
    )


def _cost_alone(
    classifier: Classifier, choice: Choice, config: RunConfig, proven: _Scorer, *, threads: int
) -> dict[str, Any]:
    """Return what a window costs and the stride that would fit, where the network forces windows that overlap much.

    Returns:
        ``window_s``, core-seconds per window, and ``stride_alone``, px; nothing where windows run as was asked for.
    """
    fitting = _stride_alone(classifier, config)
    if config.inference.engine == "window" or choice.engine == "dense" or choice.stride_px >= fitting:
        return {}
    assert isinstance(proven, scoring.WindowScorer)
    window = np.zeros((classifier.window_px, classifier.window_px, 3), np.uint8)
    begin = time.perf_counter()
    proven.run([window] * choice.batch, untimed)
    spent = time.perf_counter() - begin
    return {"window_s": threads * spent / choice.batch, "stride_alone": fitting}


class _NoRegionsError(Exception):
    """Whole blocks cannot be run; the message is the reason."""


def _fastest(
    classifier: Classifier, planned: Choice, config: RunConfig, *, threads: int
) -> tuple[Choice, dict[str, float]]:
    """Return the choice with the fastest backend, and the median seconds of all that were measured.

    Where the precision is not given, it is fp32; lower ones are tried on the run's tissue, see `precisions`.
    """
    backends = _backends(classifier, config)
    precision = "fp32" if config.inference.precision == "auto" else config.inference.precision
    candidates = [
        planned._replace(backend=backend, precision=precision)
        for backend in backends
        if precision in spec.PRECISIONS[backend]
    ]
    if not candidates:
        cause = f"{precision} is not a precision of backend {' or '.join(backends)}"
        # A network that only PyTorch runs would be refused with another backend too.
        other = " or inference.backend=openvino" if engine.is_convertible(classifier) else ""
        raise InputError(cause, f"set inference.precision=fp32{other}", stage="configuration")
    measured = _measure(classifier, candidates, config, threads=threads) if len(candidates) > 1 else {}
    return min(candidates, key=lambda each: measured.get(_name(each), math.inf)), measured


def _prove(classifier: Classifier, choice: Choice, *, threads: int, keep_as: str) -> _Scorer:
    """Prepare the network as chosen, so that a choice that does not work fails before any slide is read.

    The graph of the network is kept for later. For int8 the network is prepared in fp32.

    Raises:
        InputError: The network cannot be run as chosen.
        EnvironmentFault: A package is missing, or the CPU does not support the precision.
    """
    if choice.precision == "int8":
        openvino.require_int8()
        if choice.share_until:
            cause = "int8 is not supported for a network of which windows share only a part"
            raise InputError(cause, "set inference.precision=fp32 or bf16, or dense.share_until=''")
    precision = "fp32" if choice.precision == "int8" else choice.precision
    return scorer.make_scorer(classifier, choice._replace(precision=precision), threads=threads, keep_as=keep_as)


def _check_certifiable(choice: Choice, config: RunConfig) -> None:
    """Refuse a lower precision whose scores are not compared with fp32.

    Raises:
        InputError: No windows are compared.
    """
    if choice.precision != "fp32" and not config.dense.windows:
        cause = f"dense.windows is 0, but scores in {choice.precision} have to be compared with fp32"
        raise InputError(cause, "set dense.windows=200 or inference.precision=fp32", stage="configuration")


def _graph(classifier: Classifier, config: RunConfig) -> tuple[DenseFacts | None, str]:
    """Return the facts of the network's graph where blocks can be run whole, else None, and the reason."""
    stride_px = config.inference.stride
    if config.inference.engine == "window":
        return None, f"{_ONE_BY_ONE}, as asked"
    try:
        facts = _with_maps(scorer.describe(classifier, stride_px, local=config.dense.local), classifier, stride_px)
    except InputError as error:
        return None, f"{_ONE_BY_ONE}: {error.cause}{_with_local(classifier, config)}"
    if facts.obstacle:
        facts_or_none, reason = _partly(facts, config)
        return facts_or_none, f"{reason}{_with_local(classifier, config)}"
    if facts.window_macs / stride_px**2 <= facts.dense_macs_px:
        return None, f"{_ONE_BY_ONE}: at stride {stride_px} they share too little"
    around = ", means over a window are taken around every place" if facts.local else ""
    kept = f", of which those {stride_px} px apart are kept" if facts.grid_px != stride_px else ""
    return facts, f"blocks are run whole, a score every {facts.grid_px} px{kept}{around}"


def _with_maps(facts: DenseFacts, classifier: Classifier, stride_px: int) -> DenseFacts:
    """Return facts with the memory of further classes: the outputs, their probabilities and the maps behind them.

    Mostly a network's peak is in its first layers, and then blocks are those of a run without further classes.
    """
    outputs = classifier.outputs
    floats = 2 * (outputs.n_classes + 1 + len(outputs.maps)) if outputs.maps else 0
    return facts._replace(activation_bytes_px=max(facts.activation_bytes_px, 4 * floats / stride_px**2))


def _with_local(classifier: Classifier, config: RunConfig) -> str:
    """Return what ``dense.local=true`` would do for a network of which windows cannot share all; empty for nothing."""
    if config.dense.local:
        return ""
    try:
        facts = scorer.describe(classifier, config.inference.stride, local=True)
    except InputError:
        return ""
    alone = facts.window_macs / config.inference.stride**2
    if facts.obstacle or facts.dense_macs_px >= alone:
        return ""
    return (
        f". With dense.local=true windows would share all layers, for {facts.dense_macs_px / alone:.0%} of the "
        "multiplications of single windows; scores differ from theirs by what the certificates then say"
    )


def _partly(facts: DenseFacts, config: RunConfig) -> tuple[DenseFacts | None, str]:
    """Return the facts of a network of which windows can share only a part, where that saves enough, and the reason."""
    stride_px, deepest, asked = config.inference.stride, facts.cuts[0], bool(config.dense.share_until)
    saved = 1 - facts.dense_macs_px * stride_px**2 / facts.window_macs
    if asked:
        return facts, f"windows share the network up to a layer, as asked; {facts.obstacle}"
    if config.inference.precision == "int8":
        return None, f"{_ONE_BY_ONE}: int8 is not supported where they share only a part, and {facts.obstacle}"
    if saved < _LEAST_SAVED:
        return None, (
            f"{_ONE_BY_ONE}: sharing the network up to {deepest.name} would save {max(saved, 0):.0%} of their "
            f"multiplications at stride {stride_px}, and {facts.obstacle}"
        )
    return facts, (
        f"windows share the network up to {deepest.name}, {deepest.share:.0%} of their multiplications, which saves "
        f"{saved:.0%} at stride {stride_px}; {facts.obstacle}"
    )


def _plan_windows(classifier: Classifier, config: RunConfig) -> Choice:
    """Return the choice for windows that are run one by one, without backend and precision."""
    inference = config.inference
    if inference.engine == "dense" and inference.stride_alone:
        fitting = _stride_alone(classifier, config) if inference.stride_alone == "auto" else inference.stride_alone
        inference = inference.model_copy(update={"stride": fitting})
    return _plan_blocks(classifier, config.model_copy(update={"inference": inference}), None)


def _plan_blocks(classifier: Classifier, config: RunConfig, facts: DenseFacts | None) -> Choice:
    """Return the choice without backend and precision.

    Args:
        classifier: The network.
        config: The configuration.
        facts: The facts of the network's graph; None for windows that are run one by one.

    Raises:
        _NoRegionsError: Blocks cannot be run whole; it is never raised where ``facts`` is None.
    """
    inference, params = config.inference, config.tiles
    reach = max(geometry.window_reach_px(classifier.window_px, inference.stride, config.geometry.convention))
    context = _context_px(config, facts)
    halo = _halo_px(config, reach + context, classifier.window_px // 2 + context)
    room = context if facts is None else halo - reach
    if room < context:
        cause = f"a halo of {params.halo_px} px leaves {room} px of context, a network that pads needs {context}"
        raise _NoRegionsError(cause)
    rows, cols = _block_tiles(config, facts, halo, classifier.window_px)
    if not rows:
        cause = f"at stride {inference.stride} a single tile takes more than tiles.memory_mb={params.memory_mb}"
        raise _NoRegionsError(cause)
    return Choice(
        engine="dense" if facts else "window",
        backend="",
        precision="",
        batch=_batch(classifier, config),
        stride_px=inference.stride,
        share_until=_cut(config, facts),
        context_px=context,
        exact=facts is None or not facts.padded,
        halo_px=halo,
        block_rows=rows,
        block_cols=cols,
        refine=inference.refine,
        refine_from_px=inference.refine_from if inference.refine else 0,
        local=facts is not None and facts.local,
    )


def _batch(classifier: Classifier, config: RunConfig) -> int:
    """Return how many windows one call of the network takes: as asked, or fewer where those need too much memory."""
    window_mb = classifier.input_px**2 * _CALL_BYTES_PX / 1e6
    return max(1, min(config.inference.batch, int(config.tiles.memory_mb / window_mb)))


def _smaller_batch(choice: Choice, config: RunConfig) -> str:
    """Return why a call of the network takes fewer windows than asked; empty where it does not, or takes no windows."""
    takes_windows = choice.engine == "window" or choice.share_until
    if choice.batch == config.inference.batch or not takes_windows:
        return ""
    return f"; batches of {choice.batch}, as {config.inference.batch} windows may take more than tiles.memory_mb"


def _halo_px(config: RunConfig, least_px: int, widest_px: int) -> int:
    """Return the halo of a block, reading pixels.

    Args:
        config: The configuration; a number there is taken as it is.
        least_px: The halo that the run needs, taken for ``auto``.
        widest_px: The halo that a run at any stride needs, taken otherwise.
    """
    halo_px = config.tiles.halo_px
    if isinstance(halo_px, int):
        return halo_px
    return least_px if halo_px == "auto" else -(-widest_px // _WIDEST_STEP_PX) * _WIDEST_STEP_PX


def _context_px(config: RunConfig, facts: DenseFacts | None) -> int:
    """Return the width of the context beyond the outermost windows, reading pixels.

    It is a multiple of the spacing of the map, and not wider than what a score can see.
    """
    if facts is None:
        return 0
    seen = max(facts.overhang_px)
    context_px = seen if config.dense.halo == "exact" else min(seen, config.dense.halo)
    return -(-context_px // facts.grid_px) * facts.grid_px


def _block_tiles(config: RunConfig, facts: DenseFacts | None, halo_px: int, window_px: int) -> tuple[int, int]:
    """Return the rows and columns of the largest block, in tiles, that fits into ``tiles.memory_mb``; 0, 0 for none.

    Where a window alone takes more, a block of one tile is taken: it needs hardly more, and windows would be run
    anyway.
    """
    params = config.tiles
    if params.block_cols != "auto":
        return params.block_rows, params.block_cols
    bytes_px = _MEMORY_FACTOR * facts.activation_bytes_px if facts else _WINDOW_BYTES_PX
    for rows in range(params.block_rows, 0, -1):
        rows_px = rows * params.tile_px + 2 * halo_px
        cols = math.floor((params.memory_mb * 1e6 / (rows_px * bytes_px) - 2 * halo_px) / params.tile_px)
        if cols >= min(rows, _MOST_COLS):
            return rows, min(cols, _MOST_COLS)
    # With less memory a pixel than a window's own activations the map is not finer than that of a window.
    like_windows = bytes_px <= _CALL_BYTES_PX and window_px**2 * bytes_px > params.memory_mb * 1e6
    return (1, 1) if facts is None or like_windows else (0, 0)


def _cut(config: RunConfig, facts: DenseFacts | None) -> str:
    """Return the layer up to which windows share their features; empty where they share all layers.

    Raises:
        InputError: The configuration names a layer that the network cannot be cut after.
    """
    layer = config.dense.share_until
    if facts is not None and facts.obstacle and not layer:
        return facts.cuts[0].name
    if facts is None or not layer:
        return ""
    known = _cuts(facts)
    for name in known:
        if layer in {name, name.rpartition(".")[2]}:
            return name
    raise InputError(
        f"dense.share_until is {layer!r}, windows can share the network up to {known}",
        "name one of them, or leave it empty",
        stage="configuration",
    )


def _cuts(facts: DenseFacts | None) -> list[str]:
    """Return the layers up to which sharing differs noticeably from sharing the whole network, the last layer first."""
    return [cut.name for cut in facts.cuts if cut.share < _MOST_SHARED or facts.obstacle] if facts else []


def _backends(classifier: Classifier, config: RunConfig) -> list[str]:
    """Return the backends to choose from."""
    if not engine.is_convertible(classifier):
        return ["torch"]
    backend = config.inference.backend
    return [backend] if backend != "auto" else [name for name in engine.installed_backends() if name != "torch"]


def _name(choice: Choice) -> str:
    return f"{choice.backend} {choice.precision}"


def _measure(classifier: Classifier, choices: list[Choice], config: RunConfig, *, threads: int) -> dict[str, float]:
    """Return the median seconds by backend and precision, on the most frequent shape; the candidates take turns."""
    first = choices[0]  # they differ in backend and precision alone
    rows, cols = first.block_rows, min(first.block_rows, first.block_cols)
    tile_px, halo_px = config.tiles.tile_px, first.halo_px
    shape = (rows * tile_px + 2 * halo_px, cols * tile_px + 2 * halo_px, 3)
    if first.engine == "window":
        shape = (classifier.window_px, classifier.window_px, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    candidates: dict[str, spec.Engine] = {}
    for choice in choices:
        with contextlib.suppress(InputError):  # a backend that cannot convert this network is no candidate
            candidates[_name(choice)] = scorer.engine_to_time(classifier, choice, threads=threads)
    return engine.median_seconds(candidates, pixels, seconds=_MICRO_BENCHMARK_S) if candidates else {}
