"""Notes for the user: records that a command shows on standard output without a time or a level, see `flows.logs`.

What is logged elsewhere is shown with ``-v`` alone, and warnings always are.
"""

import logging

#: The logger of notes; its name is the same however `flows` is imported.
NOTES = logging.getLogger("wsiflow.notes")
