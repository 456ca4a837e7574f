"""`cmran pipeline` as a process: temporary Prefect server, signals to the process group, proxies, no server."""

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cmran.errors import CmranError
from flows import local, proxies
from flows.prefect_server import ServerError, started_server
from tests.conftest import ROOT

pytestmark = pytest.mark.timeout(900)

PATIENCE_S = 240.0
"""Time limit of each wait, long enough for a busy machine."""
PROXIES = [name for scheme in ("http", "https", "all", "no") for name in (f"{scheme}_proxy", f"{scheme.upper()}_PROXY")]


COMMAND = """
import sys
from flows import local
from flows.cli import main

local.END_S = float(sys.argv.pop(1))
sys.exit(main())
"""


class Pipeline:
    """A pipeline of many epochs in its own process group."""

    def __init__(self, folder: Path, data: Path, config: Path, end_s: float = PATIENCE_S, **environment: str) -> None:
        self.folder, self.log = folder, folder / "log"
        options = ["--config", config, "--out", "o", "--modes", "full", "--trials", "2", "--device", "cpu"]
        options += ["--search-epochs", "60", "--epochs", "60"]
        own = {"PREFECT_HOME": str(folder / "prefect"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, str(end_s), "pipeline", data, *options],
                cwd=folder,
                env=os.environ | own | environment,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    def reached(self, text: str) -> None:
        self._until(lambda: text in self.log.read_text() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()

    def send(self, *signals: int) -> None:
        """Send signals to the whole group, as a terminal, `timeout` and schedulers do; 0 is a short pause."""
        for number in signals:
            if number:
                os.killpg(self.process.pid, number)
            else:
                time.sleep(0.5)

    def ended(self) -> int:
        return self.process.wait(PATIENCE_S)

    def nothing_is_left(self) -> None:
        """Wait until no process of the group is left."""

        def gone() -> bool:
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return True
            return False

        self._until(gone)

    def states(self, database: str, query: str) -> set[str]:
        """Return the first column of the query; empty if its table does not exist yet."""
        with contextlib.closing(sqlite3.connect(self.folder / database)) as connection:
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
            if query.split()[-1] not in tables:
                return set()
            return {row[0] for row in connection.execute(query)}

    def flow_states(self) -> set[str]:
        return self.states("prefect/prefect.db", "SELECT state_name FROM flow_run")

    def run_states(self) -> set[str]:
        return self.states("mlflow.db", "SELECT status FROM runs")

    @staticmethod
    def _until(ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not ready():
            assert time.monotonic() < deadline, "nothing happened"
            time.sleep(0.05)


@pytest.fixture
def pipeline(
    data: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Pipeline]]:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    started = []

    def start(**more: object) -> Pipeline:
        started.append(Pipeline(tmp_path, data, tiny, **more))
        return started[-1]

    yield start
    for one in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()


# `timeout` sends TERM to its child and then to the group: two at once.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "signals", "status", "line"),
    [
        ("starting a temporary server", [signal.SIGTERM], 143, "terminated"),
        ("search: 2 trials", [signal.SIGTERM, signal.SIGTERM], 143, "terminated"),
        ("epoch 20/60", [signal.SIGINT], 130, "interrupted"),
        ("train with", [signal.SIGTERM], 143, "terminated"),
        ("exporting", [signal.SIGTERM, 0, signal.SIGTERM], 143, "terminated"),
    ],
)
def test_signal_to_the_process_group(pipeline, moment, signals, status, line):
    one = pipeline()
    one.reached(moment)
    one.send(*signals)
    assert one.ended() == status
    text = one.log.read_text()
    assert "Traceback" not in text
    assert text.splitlines()[-1] == line
    assert text.splitlines().count(line) == 1
    one.nothing_is_left()
    assert "RUNNING" not in one.run_states()
    if moment != "starting a temporary server":
        assert one.flow_states() == {"Crashed", "Completed"}
        assert "KILLED" in one.run_states()
        assert "RUNNING" not in one.states("studies.db", "SELECT state FROM trials")


def server_of_this_test() -> psutil.Process:
    (server,) = (one for one in psutil.Process().children() if any("prefect_server" in word for word in one.cmdline()))
    return server


@pytest.mark.slow
def test_kill_leaves_no_server(pipeline):
    one = pipeline()
    one.reached("search: 2 trials")
    os.kill(one.process.pid, signal.SIGKILL)
    assert one.ended() == -signal.SIGKILL
    one.nothing_is_left()


@pytest.mark.slow
def test_server_that_ends_first(pipeline, tmp_path, monkeypatch):
    """If the user's server ends at the same time, the shutdown is not delayed and the MLflow runs are closed."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    with started_server(PATIENCE_S) as url:
        one = pipeline(PREFECT_API_URL=url)
        one.reached("epoch 2/60")
        server_of_this_test().kill()
        one.send(signal.SIGTERM)
        assert one.ended() == 143
    text = one.log.read_text()
    assert "Traceback" not in text
    assert text.splitlines()[-1] == "terminated"
    assert "RUNNING" not in one.run_states()


@pytest.mark.slow
def test_lost_server(pipeline, tmp_path, monkeypatch):
    """Without a signal: one line, after the retries of Prefect's client."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    with started_server(PATIENCE_S) as url:
        one = pipeline(PREFECT_API_URL=url, PREFECT_CLIENT_MAX_RETRIES="1")
        one.reached("epoch 2/60")
    assert one.ended() == 1
    text = one.log.read_text()
    assert "Traceback" not in text
    assert text.splitlines()[-1].startswith(f"error: the Prefect server at {url} failed")
    assert "RUNNING" not in one.run_states()


@pytest.mark.slow
def test_server_that_stops_answering(pipeline, tmp_path, monkeypatch):
    """The process ends within the time limit."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    with started_server(PATIENCE_S) as url:
        one = pipeline(PREFECT_API_URL=url, end_s=3.0)
        one.reached("epoch 2/60")
        server = server_of_this_test()
        server.suspend()
        one.send(signal.SIGTERM)
        assert one.ended() == 143
        server.resume()
    text = one.log.read_text()
    assert "Traceback" not in text
    assert text.splitlines()[-1] == "terminated"


@pytest.mark.slow
def test_temporary_server_bypasses_proxies(pipeline):
    """Neither an unreachable proxy nor SOCKS without its package matters."""
    one = pipeline(http_proxy="http://127.0.0.1:9", ALL_PROXY="socks5://me:secret@127.0.0.1:9", NO_PROXY="example.org")
    one.reached("epoch 1/60")
    one.send(signal.SIGTERM)
    assert one.ended() == 143
    text = one.log.read_text()
    assert "Traceback" not in text
    assert "secret" not in text


def test_server_that_does_not_start(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(ServerError, match="unable to open database file"), started_server(PATIENCE_S):
        pass


class TestLoopback:
    @pytest.fixture(autouse=True)
    def _no_proxies(self, monkeypatch):
        for name in PROXIES:
            # monkeypatch then restores whatever a test sets.
            monkeypatch.setenv(name, "x")
            monkeypatch.delenv(name)

    def test_existing_hosts_are_kept(self, monkeypatch):
        monkeypatch.setenv("no_proxy", "example.org, localhost")
        proxies.exempt_loopback()
        assert os.environ["no_proxy"] == "example.org,localhost,127.0.0.1,::1"
        assert os.environ["NO_PROXY"] == "example.org,localhost,127.0.0.1,::1"
        proxies.exempt_loopback()
        assert os.environ["no_proxy"] == "example.org,localhost,127.0.0.1,::1"

    def test_wildcard_is_kept_alone(self, monkeypatch):
        monkeypatch.setenv("NO_PROXY", "*")
        proxies.exempt_loopback()
        assert os.environ["NO_PROXY"] == "*"

    @pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
    def test_client_bypasses_the_proxy_for_loopback(self, monkeypatch, name, host):
        import httpx

        monkeypatch.setenv(name, "http://127.0.0.1:9")
        proxies.exempt_loopback()
        with httpx.Client() as client:
            assert client._transport_for_url(httpx.URL(f"http://{host}:4200/api")) is client._transport
            assert client._transport_for_url(httpx.URL("http://example.org/")) is not client._transport
        assert proxies.proxy_of(f"http://{host}:4200/api") is None
        assert proxies.proxy_of("http://example.org/api") == name

    def test_unusable_proxy(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "socksio", None)
        monkeypatch.setenv("ALL_PROXY", "socks5://me:secret@proxy.example:1080")
        proxies.exempt_loopback()
        with pytest.raises(CmranError) as error:
            proxies.drop_unusable_proxies({"PREFECT_API_URL": "http://prefect.example/api"})
        assert "PREFECT_API_URL=http://prefect.example/api" in str(error.value)
        assert "ALL_PROXY=socks5://me:***@proxy.example:1080" in str(error.value)
        assert "socksio" in str(error.value)
        assert "ALL_PROXY" in os.environ
        monkeypatch.setenv("no_proxy", os.environ["no_proxy"] + ",prefect.example")
        proxies.drop_unusable_proxies({"PREFECT_API_URL": "http://prefect.example/api"})
        assert "ALL_PROXY" not in os.environ


@pytest.mark.parametrize("proxy", ["", "https_proxy", "ALL_PROXY"])
def test_missing_server_is_one_line(cmran, data, monkeypatch, proxy):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    url = "https://me:secret@prefect.example/api" if proxy else "http://me:secret@127.0.0.1:9/api"
    more = {proxy: "http://you:hidden@127.0.0.1:9"} if proxy else {}
    done = cmran("pipeline", data, "--out", "out", PREFECT_API_URL=url, **more)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: no Prefect server at PREFECT_API_URL={url.replace('secret', '***')}")
    assert (f"through the proxy {proxy}=http://you:***@127.0.0.1:9" in last) == bool(proxy)
    assert "secret" not in done.stderr + done.stdout
    assert "hidden" not in done.stderr + done.stdout


def test_port_that_is_not_a_prefect_server(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr(local, "ANSWER_S", 0.5)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        from prefect.settings import PREFECT_API_URL, temporary_settings

        with temporary_settings({PREFECT_API_URL: url}), pytest.raises(CmranError, match="no answer in time"):
            local._check_server(url)
