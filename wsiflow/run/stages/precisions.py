"""The stage ``choose``, and the trial of precisions that it makes where ``inference.precision`` is ``auto``.

Every precision that this processor, the backend and the configuration allow computes the scores of a few blocks of the
run's own tissue. Their core-seconds are measured, and the cheapest precision is taken whose scores pass the certificate
of the run on these blocks; where it fails, the next one is tried. All of it happens before the plan is made, and is
published with the choice, which every worker and every later start of the run follows.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wsiflow.errors import InputError, WsiflowError
from wsiflow.model.choice import Choice
from wsiflow.model.engines.spec import PRECISIONS
from wsiflow.plan.slide_plan import read_cut
from wsiflow.run.cases import read_cases, write_cases
from wsiflow.run.config import RunConfig
from wsiflow.run.executor.protocol import Outcome
from wsiflow.run.plan import Plan, publish_plan, read_plan
from wsiflow.run.stages import calibrate, certificates, certify, ingest, network, predict, stain
from wsiflow.run.stages.calibration_set import named_sha256, named_slides
from wsiflow.run.stages.choose import choice_name, publish_choice
from wsiflow.run.stages.measure import areas_px
from wsiflow.run.stages.pieces import piece, publish_piece
from wsiflow.slides.manifest import Case
from wsiflow.system import publish
from wsiflow.system.machine import cpu_supports_bf16, installed_version
from wsiflow.system.paths import is_same
from wsiflow.system.provenance import cpu, numeric_class

_SLIDES = 2
_SLIDES_OPENED = 8  # some of them may have no tissue, or be damaged
_BLOCKS = 2  # of each slide

Record = dict[str, Any]


class Trial(NamedTuple):
    """How a precision did.

    Attributes:
        choice: The choice with the precision.
        source: The plan of the blocks; the first half of its slides is certified, the second half is measured.
        core_s: Core-seconds of the blocks.
        cause: Why it could not be measured; empty where it was.
    """

    choice: Choice
    source: Path
    core_s: float = 0.0
    cause: str = ""


class Verdict(NamedTuple):
    """What the certificates of a precision say: the limits that it exceeds, and how far scores differ at most."""

    exceeded: dict[str, list[str]]
    deviation: dict[str, dict[str, float]]


def choose(source: Path, _index: int) -> tuple[publish.Receipt, bool]:
    """Choose how the run computes scores, and publish the choice; see `wsiflow.run.stages.choose`."""
    return publish_choice(source, with_cheapest_precision)


def with_cheapest_precision(source: Path, record: Record) -> Record:
    """Return the record of a choice with the cheapest precision that passes, where the configuration says ``auto``.

    Args:
        source: The ``cases.json`` of the run.
        record: The record of the choice in fp32.

    Raises:
        InputError: The slides that int8 is to be calibrated on cannot be used, or are under test.
    """
    config, listed = read_cases(source)
    if config.inference.precision != "auto":
        return record
    fp32 = Choice(**record["choice"])
    candidates, absent = _candidates(config, fp32, listed)
    if not candidates:
        return _told(record, f"precision fp32: {'; '.join(absent)}")
    with publish.private_folder(source.parent) as folder:
        try:
            pieces, names = _pieces(folder / "slides", config, listed, record)
            trials = [
                _measured(folder / each.precision, config, listed, record | {"choice": each.values()}, pieces)
                for each in (fp32, *candidates)
            ]
        except _CannotTryError as error:
            return _told(record, f"precision fp32: precisions could not be tried, {error}")
        chosen, verdicts = _cheapest(trials)
        found = _found(trials, verdicts, names)
    absent = [*_reasons(found, fp32, chosen), *absent]
    record = record | {"choice": chosen.values(), "trial": found}
    return _told(record, "; ".join([_sentence(found, fp32, chosen), *absent]))


class _CannotTryError(Exception):
    """There are no blocks to try precisions on; the message is the reason."""


def _told(record: Record, text: str) -> Record:
    return record | {"told": f"{record['told']}; {text}"}


def _candidates(config: RunConfig, fp32: Choice, listed: Sequence[Case]) -> tuple[list[Choice], list[str]]:
    """Return the choices with a lower precision, and why others are none.

    Raises:
        InputError: A slide that int8 is to be calibrated on is under test.
    """
    if not config.dense.windows:
        return [], ["dense.windows=0, and only scores that are compared with fp32 may have a lower one"]
    backend = fp32.backend
    if config.inference.backend == "auto" and backend != "torch" and installed_version("openvino"):
        backend = "openvino"  # the only one of them with lower precisions
    able = {"bf16": _obstacle_to_bf16(), "int8": _obstacle_to_int8(config, fp32)}
    able |= {each: f"backend {backend} has none" for each in able if each not in PRECISIONS[backend]}
    if not able["int8"]:
        _require_other_slides(config, listed)
    candidates = [fp32._replace(backend=backend, precision=each) for each, obstacle in able.items() if not obstacle]
    return candidates, [f"{each} is no candidate ({obstacle})" for each, obstacle in able.items() if obstacle]


def _obstacle_to_bf16() -> str:
    return "" if cpu_supports_bf16() else f"{_processor()} has no instructions for it"


def _obstacle_to_int8(config: RunConfig, fp32: Choice) -> str:
    if not isinstance(config.inference.calibration, Path):
        return "inference.calibration names no slides that are not under test"
    if fp32.share_until:
        return "windows share only a part of the network"
    return "" if installed_version("nncf") else "the package nncf is not installed: pip install 'wsiflow[int8]'"


def _require_other_slides(config: RunConfig, listed: Sequence[Case]) -> None:
    """Refuse to calibrate on the file of a slide under test; copies of it are found by their content later.

    Raises:
        InputError: One of them is.
    """
    manifest = config.inference.calibration
    assert isinstance(manifest, Path)
    named = [case.path for case in named_slides(manifest)]
    for case in listed:
        if any(is_same(case.path, path) for path in named):
            cause = "int8 would be calibrated on a slide under test, which says too much in favour of it"
            remedy = "name other slides with inference.calibration, or leave it out"
            raise InputError(cause, remedy, slide=case.slide_id, path=manifest)


def _pieces(folder: Path, config: RunConfig, listed: Sequence[Case], record: Record) -> tuple[Path, list[str]]:
    """Ingest slides from all over the list until some have tissue; return their plan and their names.

    Raises:
        _CannotTryError: None of those that were opened has tissue.
    """
    source, outcomes = _begin(folder, config, listed, record), []
    opened = min(_SLIDES_OPENED, len(listed))
    for index in (len(listed) * (2 * i + 1) // (2 * opened) for i in range(opened)):
        try:
            receipt, _ = ingest.ingest(source, index)
        except (WsiflowError, OSError):  # the run's own task says what is wrong with it
            continue
        if json.loads((folder / receipt["path"]).read_text(encoding="utf-8"))["n_tiles"]:
            outcomes.append(Outcome(index, receipt, executed=True))
        if len(outcomes) == _SLIDES:
            break
    if not outcomes:
        raise _CannotTryError(f"none of {opened} slides could be read and has tissue")
    plan_path = ingest.make_plan(source, outcomes)
    return plan_path, [planned.slide_id for planned in read_plan(plan_path).slides]


def _begin(folder: Path, config: RunConfig, listed: Sequence[Case], record: Record) -> Path:
    """Make a folder like that of a run, with a choice; return its ``cases.json``."""
    dense = config.dense.model_copy(update={"on_excess": "report"})
    store = config.store.model_copy(update={"kind": "none"})
    alone = config.model_copy(update={"share": None, "store": store, "dense": dense})
    path = folder / choice_name(config)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record), encoding="utf-8")
    return write_cases(folder, alone, listed)


def _measured(folder: Path, config: RunConfig, listed: Sequence[Case], record: Record, pieces: Path) -> Trial:
    """Compute the scores of the blocks as the record says, and measure it.

    Raises:
        _CannotTryError: It fails in fp32, so that it is not the precision's fault.
    """
    choice = Choice(**record["choice"])
    source = folder / "plan.json"
    try:
        if choice.precision == "int8":
            manifest = config.inference.calibration
            assert isinstance(manifest, Path)
            record = record | {"calibration": named_sha256(manifest)}
        source = _plan_pieces(folder, _begin(folder, config, listed, record), pieces)
        if choice.precision == "int8":
            calibrate.calibrate(source, 0)
        return Trial(choice, source, _core_s(source))
    except (WsiflowError, RuntimeError) as error:  # what backends raise is of the latter kind
        cause = error.cause if isinstance(error, WsiflowError) else str(error).strip().splitlines()[-1]
        if choice.precision == "fp32":
            raise _CannotTryError(cause) from error
        return Trial(choice, source, cause=cause)
    finally:
        network.release()


def _plan_pieces(folder: Path, cases: Path, pieces: Path) -> Path:
    """Publish a plan of a few blocks of each slide, every slide twice; their colours are measured."""
    whole, root = read_plan(pieces), pieces.parent
    settings = ingest.plan_settings(folder, read_cases(cases)[0])
    slides = []
    for number, slide in enumerate([*whole.slides, *whole.slides]):
        cut = piece(read_cut(root, slide), slide, 0.5, _BLOCKS, settings.group_tiles)
        slides.append(publish_piece(folder, root, slide, cut, f"{number}"))
    source = publish_plan(folder, Plan(settings, slides, ()))
    for index in range(len(slides)):
        if stain.STAGE.is_due(read_plan(source), index):
            stain.STAGE.work(source, index)
    return source


def _core_s(source: Path) -> float:
    """Return the core-seconds of the scores of the second half of the slides, which repeat the first half.

    The first half loads the network and prepares it for the shapes of the blocks.
    """
    plan = read_plan(source)
    half = len(plan.slides) // 2
    spent = [0.0, 0.0]
    for index in range(len(plan.slides)):
        cpu_s = time.process_time()
        for task in predict.STAGE.tasks_of(plan, index):
            predict.STAGE.work(source, task)
        spent[index >= half] += time.process_time() - cpu_s
    return spent[1]


def _cheapest(trials: Sequence[Trial]) -> tuple[Choice, dict[str, Verdict]]:
    """Return the choice of the cheapest precision that passes, and what certificates say of those that were tried.

    Fp32 passes always: where it exceeds a limit, the precision is not the reason, and the run's certificates say so.
    """
    verdicts: dict[str, Verdict] = {}
    plain = trials[0]
    for trial in sorted((each for each in trials if not each.cause), key=lambda each: each.core_s):
        if trial is plain:
            break
        found = verdicts[trial.choice.precision] = _verdict(trial.source)
        if any(certificates.method_of(kind) == "windows" for kind in found.exceeded):
            found = _without_those_of(found, verdicts.setdefault("fp32", _verdict(plain.source)))
            verdicts[trial.choice.precision] = found
        if not found.exceeded:
            return trial.choice, verdicts
    return plain.choice, verdicts


def _verdict(source: Path) -> Verdict:
    """Certify the first half of the slides of a plan, and return what the certificates say together."""
    plan, root = read_plan(source), source.parent
    exceeded: dict[str, list[str]] = {}
    deviation: dict[str, dict[str, float]] = {}
    for index in range(len(plan.slides) // 2 if certify.is_needed(plan) else 0):
        certify.certify(source, index)
        one = certificates.read(root, plan.slides[index])
        for kind, reasons in certificates.exceeded(plan, one).items():
            if reasons:
                exceeded.setdefault(kind, []).extend(reasons)
            found, most = certificates.deviation(plan, one, kind), deviation.setdefault(kind, {})
            for name in ("mean_abs_diff", "max_abs_diff", "flips"):
                most[name] = max(most.get(name, 0.0), getattr(found, name))
    network.release()
    return Verdict(exceeded, deviation)


def _without_those_of(found: Verdict, fp32: Verdict) -> Verdict:
    """Return a verdict without limits to single windows that fp32 exceeds as well: the precision is not the reason."""
    own = {
        kind: reasons
        for kind, reasons in found.exceeded.items()
        if certificates.method_of(kind) != "windows" or kind not in fp32.exceeded
    }
    return found._replace(exceeded=own)


def _found(trials: Sequence[Trial], verdicts: Mapping[str, Verdict], names: Sequence[str]) -> Record:
    """Return everything that was measured, as JSON values."""
    plan, root = read_plan(trials[0].source), trials[0].source.parent
    timed = slice(len(plan.slides) // 2, None)
    px = sum(areas_px(root, plan)[timed])
    candidates: Record = {}
    for trial in trials:
        values = {
            "backend": trial.choice.backend,
            "core_s": trial.core_s,
            "core_s_per_megapixel": trial.core_s / px * 1e6,
        }
        each = {"cause": trial.cause} if trial.cause else values
        verdict = verdicts.get(trial.choice.precision)
        candidates[trial.choice.precision] = each | (verdict._asdict() if verdict else {})
    return {
        "cpu": cpu(),
        "isa": numeric_class()["isa"],
        "slides": list(names),
        "blocks": sum(planned.n_blocks for planned in plan.slides[timed]),
        "megapixels": px / 1e6,
        "candidates": candidates,
    }


def _sentence(found: Record, fp32: Choice, chosen: Choice) -> str:
    """Return which precision was chosen, and on what."""
    blocks = f"{found['blocks']} block{'s' if found['blocks'] > 1 else ''}"
    slides = f"slide{'s' if len(found['slides']) > 1 else ''} {' and '.join(found['slides'])}"
    where = f"{blocks} of {slides}, {_processor()}"
    if chosen == fp32:
        return f"precision fp32 was chosen on {where}"
    return f"precision {chosen.precision} was chosen: {_speed(found, chosen.precision)} on {where}"


def _reasons(found: Record, fp32: Choice, chosen: Choice) -> list[str]:
    """Return why each of the other lower precisions was not chosen."""
    reasons = []
    for precision, each in found["candidates"].items():
        if precision in {fp32.precision, chosen.precision}:
            continue
        exceeded = "; ".join(text for kind in each.get("exceeded", {}).values() for text in kind)
        why = each.get("cause", "") or (f"not certified: {exceeded}" if exceeded else "")
        reasons.append(f"{precision} was not" + (f" ({why})" if why else f" ({_speed(found, precision)})"))
    return reasons


def _speed(found: Record, precision: str) -> str:
    candidates = found["candidates"]
    return f"{candidates['fp32']['core_s'] / candidates[precision]['core_s']:.1f} times as fast as fp32"


def _processor() -> str:
    about = numeric_class()
    return f"{cpu()} ({', '.join(filter(None, (about['isa'], about['pins'])))})"
