"""``wsiflow evaluate``: score existing detections, of wsiflow or of another system."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from wsiflow.evaluation.evaluate import Existing, evaluate_existing
from wsiflow.run.config import evaluation_params

from ..options import group, natural, positive
from ..terminal import remark, say


def add_options(parser: ArgumentParser) -> None:
    """Add the detections and their truth, and the options of the scoring."""
    parser.add_argument(
        "--manifest", type=Path, required=True, help="CSV: slide_id, path, and label, annotation or mask"
    )
    parser.add_argument(
        "--detections", type=Path, required=True, help="folder with one <slide_id>.csv per slide: prob,x,y"
    )
    parser.add_argument("--scores", type=Path, help="CSV with slide_id,score; without it the highest detection counts")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--protocol", default="own_spacing", help="own_spacing, camelyon16 (its spacing and exclusions)"
    )
    parser.add_argument("--um-px", type=float, help="level-0 spacing for every slide (CAMELYON16: 0.243)")
    parser.add_argument("--downsample", type=int, help="level-0 px per evaluation mask px (32)")
    parser.add_argument(
        "--mask-downsample",
        type=positive,
        help="scale at which mask images are read; 1: they are at evaluation resolution",
    )
    parser.add_argument(
        "--mask-tumour", type=int, nargs="+", metavar="VALUE", help="values of mask images that are tumour, no other is"
    )
    parser.add_argument(
        "--unit",
        choices=["px", "um"],
        default="px",
        help="what x and y of detections are in: level-0 px, or um from the corner of level 0 (px)",
    )
    parser.add_argument(
        "--group",
        type=group,
        nargs="+",
        metavar="NAME=MEANING",
        help="what groups of annotations enclose: tumour, normal, ignore or other, as in --group Necrosis=ignore",
    )
    parser.add_argument(
        "--outline-origin", choices=["auto", "slide", "bounds"], help="where the coordinates of annotations count from"
    )
    parser.add_argument("--bootstrap", type=int, help="resamples of the intervals (2000)")
    parser.add_argument("--seed", type=natural, default=0)


def main(arguments: Namespace) -> int:
    """Score the detections, and write and print the scores."""
    changes = {"downsample": arguments.downsample, "l0_um_px": arguments.um_px, "bootstrap": arguments.bootstrap}
    changes |= {"mask_tumour": arguments.mask_tumour, "outline_origin": arguments.outline_origin}
    changes["groups"] = dict(arguments.group) if arguments.group else None
    params = evaluation_params(arguments.protocol, changes)
    existing = Existing(
        arguments.manifest, arguments.detections, arguments.scores, arguments.mask_downsample, arguments.unit
    )
    scores = evaluate_existing(existing, params, seed=arguments.seed, out=arguments.out)
    say(f"protocol {params.name} {params.protocol_hash()[:12]}")
    for name, value in scores.metrics.items():
        say(f"{name} {value:.6f}")
    for sentence in scores.remarks:
        remark(f"note: {sentence}")
    return 0
