"""``python -m wsiflow.flows run ...`` is ``wsiflow run ...``."""

import sys

from .run import main

if __name__ == "__main__":
    sys.exit(main())
