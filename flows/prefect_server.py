"""A temporary Prefect server that never outlives the process that started it.

The server stops when its standard input is closed: after the pipeline, or because the pipeline was killed. It blocks
SIGINT and SIGTERM, which may be sent to the whole process group, so that the flow can still report its final state.
This file is also the script of the server process, where it imports none of our modules.
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
"""Time limit of a clean shutdown, in seconds."""

_BLOCKED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class ServerError(Exception):
    """The server did not start; the message is the reason."""


@contextlib.contextmanager
def started_server(timeout_s: float) -> Iterator[str]:
    """Run a server within the block and yield the URL of its API.

    Args:
        timeout_s: Time limit of the start, in seconds.

    Raises:
        ServerError: The server did not start.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        # The new process inherits the blocked signals, so none can end it before it could block them itself.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
        try:
            process = subprocess.Popen(
                # -P keeps this folder and the current one off sys.path: no module in them can shadow another.
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
    """Return the port, which the server prints when it is ready."""
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
        """Prints its port when it is ready."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                print(listener.getsockname()[1], flush=True)

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        server.should_exit = True
        # The parent no longer waits for an answer: end even if the server is starting or a request hangs.
        time.sleep(STOP_S if server.started else 0.0)
        os._exit(0)

    config = uvicorn.Config(
        "prefect.server.api.server:create_app",
        factory=True,
        log_level="error",
        lifespan="on",
        # The Prefect client may leave connections open.
        timeout_graceful_shutdown=1,
    )
    server = Server(config)
    threading.Thread(target=end_with_parent, daemon=True).start()
    with socket.create_server((HOST, 0)) as listener:
        server.run(sockets=[listener])


if __name__ == "__main__":
    _serve()
