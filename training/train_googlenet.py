"""Train GoogLeNet for some minutes on synthetic and real patches, and write its weights and card.

    python training/train_googlenet.py --data ../shared/data --out somewhere --seed 0

Output: `googlenet.safetensors` and `googlenet.json`, which are not part of the package. It takes one process and some
eight minutes on one core with bfloat16. The network is trained only enough to measure how engines differ.
"""

import torch
from fit import Recipe, fit, parsed, parser
from torch import nn

from wsiflow.model.architectures.registry import build

ARCHITECTURE_ARGS = {"dropout": 0.5}
ABOUT = {"name": "googlenet", "architecture": "googlenet", "architecture_args": ARCHITECTURE_ARGS}


def initialise(net: nn.Module) -> None:
    """Draw weights that keep the magnitude of activations from layer to layer, since there is no batch norm."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) and layer.bias is None:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


def main() -> None:
    """Train, evaluate and write the network."""
    given = parsed(parser(__doc__ or "", steps=450))
    torch.manual_seed(given.seed)
    net = build("googlenet", 2, **ARCHITECTURE_ARGS)
    initialise(net)
    fit(net, ABOUT, Recipe(given.steps, (8, 6, 2), rate=3e-4, clip=1.0, bf16=True, seed=given.seed), given)


if __name__ == "__main__":
    main()
