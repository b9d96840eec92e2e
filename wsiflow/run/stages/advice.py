"""The stage ``advise``: where certificates exceed the tolerance, it searches once for a setting that keeps it."""

import json
import time
from pathlib import Path

import numpy as np

from wsiflow.errors import InputError
from wsiflow.model import certificate
from wsiflow.run.plan import Plan, Task, read_plan
from wsiflow.run.stages import certificates
from wsiflow.run.stages.certificates import Certificate
from wsiflow.run.stages.certify import STAGE, dense_scorer, sample, windows_of
from wsiflow.run.stages.predict import published
from wsiflow.system import publish
from wsiflow.system.usage import untimed

#: Name of the file with the result of the search for a setting, relative to the run's folder.
ADVICE = "advice.json"

_SEARCH_CPU_S = 60.0
_CUTS_TRIED = 4


def slides_without_advice(root: Path, plan: Plan) -> list[int]:
    """Return the indices of the slides beyond the tolerance for which a search for a setting may find one.

    The list is empty where the search was done already, or where there is no setting between this one and single
    windows.
    """
    choice = plan.settings.choice
    if choice.engine != "dense" or choice.exact or not plan.settings.shared_layers or text(root, plan):
        return []
    certified = [index for index in range(len(plan.slides)) if _is_certified(root, plan, index)]
    return [
        index
        for index in certified
        if certificates.exceeded(plan, certificates.read(root, plan.slides[index]))["windows"]
    ]


def _is_certified(root: Path, plan: Plan, index: int) -> bool:
    """Tell whether a slide has its certificate, and not that of an earlier version or of other truth."""
    if not publish.has_recorded_size(root, certificates.name_of(plan.slides[index])):
        return False
    return certificates.is_current(root, plan.slides[index], STAGE.key_of(root, plan, index))


def text(root: Path, plan: Plan) -> str:
    """Return the result of the search for a setting as a sentence; empty where there was no search for this plan."""
    path = root / ADVICE
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return str(record["told"]) if record.get("key") == _advice_key(plan) else ""


def _advice_key(plan: Plan) -> str:
    return publish.key_of(settings=plan.settings.numbers(), work=plan.settings.work())


def advise(source: Path, _index: int) -> tuple[publish.Receipt, bool]:
    """Search a setting that keeps the tolerance on the windows of one slide, and write ``advice.json``; once a run."""
    plan, root = read_plan(source), source.parent
    result = _search_setting(root, plan, slides_without_advice(root, plan)[0])
    publish.write_view(root, ADVICE, json.dumps({"key": _advice_key(plan), "told": result}).encode())
    return {"path": ADVICE, "attempt": ""}, True


def _search_setting(root: Path, plan: Plan, index: int) -> str:
    """Return, as a sentence, a setting that keeps the tolerance on the certified windows of a slide, tried in fp32.

    Layers up to which windows share the network are tried, the cheapest for a run first. A layer is given up as soon as
    it can no longer keep the tolerance. The search may take as many CPU seconds as the scores of the slide took, and at
    least `_SEARCH_CPU_S`.
    """
    choice, planned = plan.settings.choice, plan.slides[index]
    receipts = [published(root, plan, Task(index, k)) for k in range(1, planned.n_groups + 1)]
    until = time.process_time() + max(_SEARCH_CPU_S, sum(receipt["cpu_s"] for receipt in receipts))
    one, drawn = certificates.read(root, planned), sample(root, plan, index).drawn
    cuts = plan.settings.shared_layers
    also = " and inference.precision=fp32" if choice.precision != "fp32" else ""
    for cut in cuts[:: -(-len(cuts) // _CUTS_TRIED) or 1]:
        if time.process_time() > until:
            return "no setting was found in the time that the search may take"
        try:
            shared = dense_scorer(plan, choice._replace(share_until=cut, precision="fp32"))
        except InputError:  # windows at this stride cannot be cut from the map of that layer
            continue
        scores: list[float] = []
        for pixels in windows_of(root, plan, planned, drawn, context_px=choice.context_px):
            each = shared.run(pixels, untimed)
            scores += (each[..., 0] if plan.settings.maps else each).ravel().tolist()
            if time.process_time() > until or _exceeds_for_sure(plan, one, scores):
                break
        else:
            tried = _with_scores(one, scores)
            if not any(certificates.exceeded(plan, tried).values()):
                difference = certificates.deviation(plan, tried, "windows")
                return (
                    f"set dense.share_until={cut}{also} (mean abs diff {difference.mean_abs_diff:.2g} on its windows)"
                )
    return "none of the layers up to which windows may share the network keeps the tolerance"


def _with_scores(one: Certificate, scores: list[float]) -> Certificate:
    """Return a certificate as it would be with other scores of its windows, and nothing else compared."""
    return one._replace(pairs={"windows": {"scores": scores, "expected": one.pairs["windows"]["expected"]}})


def _exceeds_for_sure(plan: Plan, one: Certificate, scores: list[float]) -> bool:
    """Tell whether the first scores differ so much that the mean over all of them exceeds the tolerance for sure."""
    n, weighing = len(scores), one.weighing()
    first = certificate.score_deviation(
        np.array(scores, np.float32),
        np.array(one.pairs["windows"]["expected"][:n], np.float32),
        threshold=plan.settings.lesions.threshold,
        weighing=weighing.of(slice(n)),
    )
    share = float(weighing.weight[:n].sum() / weighing.weight.sum())
    return max(first.mean_abs_diff, first.flips) * share > plan.settings.tolerance
