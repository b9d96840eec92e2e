"""The temporary Prefect server of a run: ``python -m wsiflow.flows.temporary_server SOCKET PARENT``.

It listens on a socket that its parent has opened, and ends when its parent has ended, however that died: nobody else
knows of it.
"""

import socket
import sys

from wsiflow.system import processes


def main() -> None:
    """Serve until the parent is gone or asks for the end."""
    listening = socket.socket(fileno=int(sys.argv[1]))
    processes.end_with(int(sys.argv[2]))
    import uvicorn

    served = uvicorn.Config(
        "prefect.server.api.server:create_app", factory=True, log_level="error", lifespan="on", access_log=False
    )
    uvicorn.Server(served).run(sockets=[listening])


if __name__ == "__main__":
    main()
