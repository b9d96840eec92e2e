"""Stain vectors from the extreme angles of densities in their principal plane (Macenko et al. 2009)."""

import numpy as np

from wsiflow.slides.stain.density import principal
from wsiflow.slides.stain.params import Floats

MACENKO_LEAST_OD = 0.15  # minimum in any channel; the direction of paler pixels is too noisy
MACENKO_PERCENTILES = (1.0, 99.0)


def macenko_vectors(density: Floats) -> Floats:
    """Return the two outermost directions, (2, 3), of densities (3, n) in the plane of their largest variance."""
    dense = density[:, (density > MACENKO_LEAST_OD).any(axis=0)]
    _, axes = principal(dense)
    plane = axes[:2] * np.where(axes[:2, :1] < 0, -1.0, 1.0)
    along, across = np.einsum("kc,cn->kn", plane, dense)
    angles = np.percentile(np.arctan2(across, along), MACENKO_PERCENTILES)
    turned: Floats = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.asarray(np.einsum("ik,kc->ic", turned, plane))
