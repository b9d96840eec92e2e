"""The vectors of two stains from a sparse dictionary (Vahadane et al. 2016)."""

import numpy as np

from wsiflow.slides.stain.density import stain_codes
from wsiflow.slides.stain.params import LEAST_OD, Floats

DICTIONARY_PENALTY = 0.1

# Where the search for a dictionary begins: usual H and E, so that the same order and minimum are found everywhere.
FIRST_GUESS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11))


def vahadane_vectors(density: Floats, iterations: int) -> Floats:
    """Learn two non-negative vectors from which the densities are sparse sums.

    Minimises ``|density - codes @ stains|² / 2 + DICTIONARY_PENALTY * sum(codes)`` over codes and over unit
    vectors, by turns: the codes in closed form, then each vector (Mairal et al., ICML 2009, algorithm 2).

    Args:
        density: Shape (3, n).
        iterations: Turns.

    Returns:
        Shape (2, 3).
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
