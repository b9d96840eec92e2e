"""Train the demo network on synthetic and real patches, and write its weights and card.

    python training/train_demo.py --data ../shared/data --out wsiflow/model/weights --seed 0

Output: `demo.safetensors` and `demo.json`. It takes one process and about a quarter of an hour on one core.
"""

import math

import torch
from fit import Recipe, fit, parsed, parser

from wsiflow.model.architectures.registry import build

ARCHITECTURE_ARGS = {"width": 0.25, "dropout": 0.2}
ABOUT = {"name": "demo", "architecture": "inception_valid", "architecture_args": ARCHITECTURE_ARGS}


def main() -> None:
    """Train, evaluate and write the network."""
    given = parsed(parser(__doc__ or "", steps=1200))
    torch.manual_seed(given.seed)
    net = build("inception_valid", 2, **ARCHITECTURE_ARGS)
    fit(net, ABOUT, Recipe(given.steps, (24, 24, 4), rate=4e-3, clip=math.inf, bf16=False, seed=given.seed), given)


if __name__ == "__main__":
    main()
