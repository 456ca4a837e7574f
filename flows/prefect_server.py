"""A Prefect server that lives as long as the process that started it, and no longer.

It ends when its standard input ends: in order when the pipeline is over, and by itself when the pipeline was killed. It
blocks TERM and Ctrl-C, which may go to the whole process group: the flow must be able to report its last state to it.
This file is also the script that runs in the server's process; there it needs nothing of ours.
"""

import contextlib
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import IO

HOST = "127.0.0.1"
STOP_S = 3.0
"""How long the server may take to end in order."""

_BLOCKED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class ServerError(Exception):
    """The server did not start; the message says why."""


@contextlib.contextmanager
def started_server(timeout_s: float) -> Iterator[str]:
    """Within the block a server runs; yields the URL of its API. Raises ServerError."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        # A new process inherits what is blocked: no signal can end it before it could block them itself.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
        try:
            process = subprocess.Popen(
                # -P: neither this folder nor the current one goes on its sys.path, so no module there hides another.
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1"},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield f"http://{HOST}:{_port(process, process.stdout, errors, timeout_s)}/api"
        finally:
            process.stdin.close()
            process.stdout.close()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _port(process: subprocess.Popen[bytes], answers: IO[bytes], errors: IO[str], timeout_s: float) -> int:
    """The port, which the server prints when it is ready."""
    with selectors.DefaultSelector() as selector:
        selector.register(answers, selectors.EVENT_READ)
        if not selector.select(timeout_s):
            raise ServerError(f"it was not ready within {timeout_s:.0f} s")
    if line := answers.readline():
        return int(line)
    status = process.wait()
    errors.seek(0)
    lines = [line.strip() for line in errors if re.match(r"[\w.]+(Error|Exception)\b", line)]
    raise ServerError(lines[-1] if lines else f"it ended with status {status}")


def _serve() -> None:
    import uvicorn

    class Server(uvicorn.Server):
        """Reports its port when it is ready."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                print(listener.getsockname()[1], flush=True)

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        server.should_exit = True
        # Not ready yet, or a request that does not end: nobody waits for an answer any more.
        time.sleep(STOP_S if server.started else 0.0)
        os._exit(0)

    config = uvicorn.Config(
        "prefect.server.api.server:create_app",
        factory=True,
        log_level="error",
        lifespan="on",
        # Prefect's client may leave connections open.
        timeout_graceful_shutdown=1,
    )
    server = Server(config)
    threading.Thread(target=end_with_parent, daemon=True).start()
    with socket.create_server((HOST, 0)) as listener:
        server.run(sockets=[listener])


if __name__ == "__main__":
    _serve()
