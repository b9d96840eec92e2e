"""Stain vectors from sparse dictionary learning (Vahadane et al. 2016)."""

import numpy as np

from wsiflow.slides.stain.density import stain_codes
from wsiflow.slides.stain.params import LEAST_OD, Floats

DICTIONARY_PENALTY = 0.1

# The initial dictionary: typical vectors of haematoxylin and eosin, so that order and minimum are always the same.
FIRST_GUESS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11))


def vahadane_vectors(density: Floats, iterations: int) -> Floats:
    """Return two non-negative stain vectors of which the densities are sparse sums.

    The search minimises ``|density - codes @ stains|² / 2 + DICTIONARY_PENALTY * sum(codes)`` alternately over the
    codes, in closed form, and over each unit vector (Mairal et al., ICML 2009, algorithm 2).

    Args:
        density: float64 (3, n), optical densities of tissue.
        iterations: Number of alternations.

    Returns:
        float64 (2, 3), one stain vector per row.
    """
    stains = np.array(FIRST_GUESS)
    stains /= np.sqrt(np.square(stains).sum(axis=1, keepdims=True))
    for _ in range(iterations):
        codes = stain_codes(density, stains, DICTIONARY_PENALTY)
        products = np.einsum("kn,ln->kl", codes, codes)
        targets = np.einsum("kn,cn->kc", codes, density)
        for k in (0, 1):
            if products[k, k] > 0:
                moved = np.maximum(stains[k] + (targets[k] - products[k] @ stains) / products[k, k], 0)
                stains[k] = moved / max(float(np.sqrt(np.square(moved).sum())), LEAST_OD)
    return stains
