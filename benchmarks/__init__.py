"""Benchmarks of speed, of distance from the machine's limits, of exactness and of memory.

Importing the package limits the numerical libraries to one thread, which has to happen before they are imported.
"""

import os

os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_DYNAMIC": "FALSE",
        "MKL_DYNAMIC": "FALSE",
        "DO_NOT_TRACK": "1",
    }
)
