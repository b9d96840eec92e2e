"""The temporary Prefect server of a run: ``python -m wsiflow.flows.temporary_server SOCKET PARENT``.

It listens on a socket that its parent has opened, and ends when its parent has ended, however that died: nobody else
knows of it.
"""

import os
import socket
import sys
import threading
import time

_PARENT_POLL_S = 1.0


def main() -> None:
    """Serve until the parent is gone or asks for the end."""
    listening, parent = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import uvicorn

    served = uvicorn.Config(
        "prefect.server.api.server:create_app", factory=True, log_level="error", lifespan="on", access_log=False
    )
    uvicorn.Server(served).run(sockets=[listening])


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_S)
    os._exit(1)


if __name__ == "__main__":
    main()
