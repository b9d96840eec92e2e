"""The temporary Prefect server of a run: ``python -m wsiflow.flows.temporary_server SOCKET PARENT``.

It listens on a socket that its parent has opened, and ends when its parent has ended, even where that was killed,
since no other process would end it.
"""

import socket
import sys

from wsiflow.system import processes


def main() -> None:
    """Serve until the parent has ended, or terminates this process."""
    listening = socket.socket(fileno=int(sys.argv[1]))
    processes.end_with(int(sys.argv[2]))
    import uvicorn

    config = uvicorn.Config(
        "prefect.server.api.server:create_app", factory=True, log_level="error", lifespan="on", access_log=False
    )
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
