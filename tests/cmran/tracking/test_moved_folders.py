"""Location of a database and its artifacts: unusual names, moved and copied folders, readers, registries, variables."""

import contextlib
import logging
import os
import shlex
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cmran import tracking
from cmran.errors import CmranError
from cmran.tracking import store
from cmran.tracking.runs import _git_state
from tests.cmran.tracking.test_tracking import FINGERPRINT, client, quick_run, tiny_onnx
from tests.cmran.utils.test_uris import NAMES

WorkIn = Callable[[Path], Path]


@pytest.fixture
def work_in(_migrated_database: Path, monkeypatch: pytest.MonkeyPatch) -> WorkIn:
    """Return a function that changes to a folder without any variable set, and creates a database there if needed."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        # This also undoes what MLflow itself sets.
        monkeypatch.setenv(name, "")

    def go(folder: Path) -> Path:
        from mlflow.tracking._tracking_service import utils

        # A new process would have an empty cache.
        utils._artifact_repos_cache.clear()
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(folder)
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
            monkeypatch.delenv(name, raising=False)
        database = folder / "mlflow.db"
        if not database.exists():
            shutil.copyfile(_migrated_database, database)
            with contextlib.closing(sqlite3.connect(database)) as connection, connection:
                location = (folder / "mlruns" / "0").as_uri()
                connection.execute("UPDATE experiments SET artifact_location = ?", (location,))
        return database

    return go


def released(folder: Path) -> tracking.Registered:
    with quick_run() as run:
        run.log_text("hello", "report.md")
    path = tiny_onnx(folder / "tiny.onnx")
    return tracking.register_release(
        onnx_path=path, run_id=run.run_id, mode="full", val_accuracy=70.0, fingerprint=FINGERPRINT
    )


# ------------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_can_have_any_name(work_in: WorkIn, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    work_in(folder)
    with quick_run() as run:
        run.log_text("hello", "report.md")
    assert tracking.run_artifact(run.run_id, "report.md", tmp_path / "got").read_text() == "hello"
    assert len(list(folder.glob("mlruns/cmran-full/*/artifacts/report.md"))) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["mlflow.db", "mlflow.db.lock", "mlruns"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({name, "got"})


def test_a_database_is_created_where_mlflow_run_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.utils.file_utils import path_to_local_sqlite_uri

    name = "my proj a%20b?"
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    # Like `mlflow run`, which also leaves this folder.
    uri = path_to_local_sqlite_uri(str(folder / "mlflow.db"))
    Path(uri.removeprefix("sqlite:///")).parent.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with quick_run() as run:
        run.log_text("hello", "report.md")
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database:
        assert database.execute("SELECT count(*) FROM runs").fetchone() == (1,)
    assert sorted(path.name for path in folder.iterdir()) == ["mlflow.db", "mlflow.db.lock", "mlruns"]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_used_folder_with_percent_signs_is_kept(
    work_in: WorkIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = work_in(tmp_path / "my proj")
    other = tmp_path / "my%20proj"
    other.mkdir()
    (other / "file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/my%20proj/mlflow.db")
    assert tracking.connect() == f"sqlite:///{database}"
    assert (other / "file").exists()


# ------------------------------------------------------------------------------------------- moved and copied folders


def test_a_moved_folder_works_as_before(work_in: WorkIn, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = tmp_path / "orig", tmp_path / "mo ved"
    work_in(old)
    released(tmp_path)
    before = tracking.resolve_model("models:/cmran-full@champion")
    old.rename(new)
    work_in(new)
    with caplog.at_level(logging.INFO, "cmran"):
        found = tracking.resolve_model("models:/cmran-full@champion")
        assert (found.digest, found.run_id) == (before.digest, before.run_id)
        assert found.path.is_relative_to(new)
        assert found.run_id is not None
        assert tracking.run_artifact(found.run_id, "report.md", tmp_path / "got").read_text() == "hello"
        again = tracking.open_run(found.run_id)
        again.log_text("more", "more.md")
        registered = released(tmp_path)
    assert registered.version == 2
    assert not old.exists()
    (line,) = [record.getMessage() for record in caplog.records if "was moved or copied" in record.getMessage()]
    assert f"read and written in {new}/mlruns instead of the recorded {old}/mlruns" in line
    assert len(list(new.glob("mlruns/cmran-full/*/artifacts/report.md"))) == 2
    assert len(list(new.glob("mlruns/cmran-full/*/artifacts/more.md"))) == 1


def test_a_copy_does_not_change_the_original(work_in: WorkIn, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = tmp_path / "orig", tmp_path / "copy"
    work_in(old)
    released(tmp_path)
    shutil.copytree(old, new)
    before = sorted(old.rglob("*"))
    work_in(new)
    with caplog.at_level(logging.INFO, "cmran"):
        released(tmp_path)
        assert tracking.resolve_model("models:/cmran-full/1").path.is_relative_to(new)
        assert tracking.resolve_model("models:/cmran-full/2").path.is_relative_to(new)
    assert "was moved or copied" in caplog.text
    assert sorted(old.rglob("*")) == before


def test_artifacts_in_a_configured_location_stay_there(
    work_in: WorkIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, database = tmp_path / "kept", work_in(tmp_path / "proj")
    with quick_run() as run:
        run.log_text("hello", "report.md")
    shutil.move(tmp_path / "proj" / "mlruns", kept / "mlruns")
    work_in(tmp_path / "proj")
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            connection.execute(
                f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(tmp_path / "proj"), str(kept))
            )
    assert tracking.run_artifact(run.run_id, "report.md", tmp_path / "got").read_text() == "hello"
    with quick_run() as another:
        another.log_text("hello", "report.md")
    assert len(list(kept.glob("mlruns/cmran-full/*/artifacts/report.md"))) == 2
    assert not (tmp_path / "proj" / "mlruns").exists()


def test_missing_artifacts_are_named(work_in: WorkIn, tmp_path: Path) -> None:
    work_in(tmp_path / "proj")
    registered = released(tmp_path)
    shutil.rmtree(tmp_path / "proj" / "mlruns")
    with pytest.raises(
        CmranError, match=r"its files are missing: the tracking database expects them in .*/proj/mlruns/"
    ):
        tracking.resolve_model(registered.uri)
    (version,) = tracking.registered_versions("cmran-full")
    with pytest.raises(CmranError, match=r"has no artifact 'report.md' .*does not exist"):
        tracking.run_artifact(str(version.run_id), "report.md", tmp_path / "got")


# --------------------------------------------------------------------------------------------------------- readers


def test_a_reader_creates_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/below/mlflow.db")
    for read in (
        lambda: tracking.resolve_model("models:/cmran-full@champion"),
        lambda: tracking.resolve_model("runs:/" + "0" * 32 + "/model"),
        lambda: tracking.registered_versions("cmran-full"),
        lambda: tracking.run_info("0" * 32),
        lambda: tracking.checkpoint_of_run("0" * 32, tmp_path / "got"),
        lambda: tracking.open_run("0" * 32),
    ):
        with pytest.raises(CmranError, match=r"there is no tracking database .*/below/mlflow.db.*MLFLOW_TRACKING_URI"):
            read()
    assert list(tmp_path.iterdir()) == []
    # It does not create tables in another database either.
    (tmp_path / "below").mkdir()
    with contextlib.closing(sqlite3.connect(tmp_path / "below" / "mlflow.db")) as database, database:
        database.execute("CREATE TABLE other (x)")
    before = (tmp_path / "below" / "mlflow.db").read_bytes()
    with pytest.raises(CmranError, match="contains no MLflow tables"):
        tracking.registered_versions("cmran-full")
    assert (tmp_path / "below" / "mlflow.db").read_bytes() == before


def test_the_message_names_the_source_of_the_uri(
    work_in: WorkIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work_in(tmp_path).unlink()
    with pytest.raises(CmranError, match="the default without MLFLOW_TRACKING_URI"):
        tracking.registered_versions("cmran-full")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(CmranError, match=r"server http://127.0.0.1:9 \(MLFLOW_TRACKING_URI\) is not reachable"):
        tracking.connect()


# ---------------------------------------------------------------------------------------------------------- registry


def test_a_separate_registry_is_used(work_in: WorkIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work_in(tmp_path / "tracking")
    own = tmp_path / "my registry" / "models.db"
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{str(own).replace(' ', '%20')}")
    registered = released(tmp_path)
    assert registered.alias == "champion"
    assert tracking.resolve_model("models:/cmran-full@champion").version == 1
    with contextlib.closing(sqlite3.connect(own)) as database:
        assert database.execute("SELECT count(*) FROM model_versions").fetchone() == (1,)
    monkeypatch.delenv("MLFLOW_REGISTRY_URI")
    assert tracking.registered_versions("cmran-full") == []
    assert tracking.connect_registry() == tracking.tracking_uri()


def test_an_unreachable_registry_is_named(tracking_db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://me:geheim99@127.0.0.1:9")
    for call in (
        tracking.connect_registry,
        lambda: tracking.resolve_model("models:/cmran-full@champion"),
        lambda: tracking.registered_versions("cmran-full"),
    ):
        with pytest.raises(CmranError, match=r"registry server http://me:\*\*\*@127.0.0.1:9 \(MLFLOW_REGISTRY_URI\)"):
            call()
    # A run does not need the registry.
    with quick_run():
        pass


# ----------------------------------------------------------------------------------------------------- other variables


def test_a_leftover_run_id_is_named(tracking_db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CmranError, match=f"MLFLOW_RUN_ID={'0' * 32} .* unknown or deleted .*unset MLFLOW_RUN_ID"):
        tracking.check_adopted_run("0" * 32)
    with quick_run() as run:
        pass
    tracking.check_adopted_run(run.run_id)
    client().delete_run(run.run_id)
    with pytest.raises(CmranError, match=f"MLFLOW_RUN_ID={run.run_id}"):
        tracking.check_adopted_run(run.run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(CmranError, match=r"MLFLOW_RUN_ID=.*\(MLFLOW_TRACKING_URI\) is not reachable"):
        tracking.check_adopted_run(run.run_id)


def test_an_unencoded_special_character_in_a_password_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in ("http://user:ge/heim99@127.0.0.1:9", "postgresql://user:ge@heim99@127.0.0.1/d"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(CmranError, match=r"MLFLOW_TRACKING_URI: .*percent-encode") as error:
            tracking.connect()
        assert "heim99" not in str(error.value)


def test_a_server_with_its_own_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import http.server
    import json
    import ssl
    import threading

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = json.dumps({"experiments": []}).encode()
            ok = self.path == "/health" or self.headers.get("Authorization") == "Bearer geheim99"
            self.send_response(200 if ok else 401)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    created = shutil.which("openssl") and subprocess.run(
        shlex.split("openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out certificate.pem -days 2")
        + shlex.split("-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"),
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    if not created or created.returncode:
        pytest.skip("openssl cannot create a certificate here")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        checked = store._Store(f"https://127.0.0.1:{server.server_port}", "MLFLOW_TRACKING_URI")
        with pytest.raises(CmranError, match=r"certificate.*MLFLOW_TRACKING_SERVER_CERT_PATH"):
            store._check_server(checked)
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
        with pytest.raises(CmranError, match=r"rejects the login \(HTTP 401\).*MLFLOW_TRACKING_TOKEN"):
            store._check_server(checked)
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "geheim99")
        store._check_server(checked)
        monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")
        monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
        store._check_server(checked)
    finally:
        server.shutdown()
        server.server_close()


def test_untracked_files_do_not_make_a_tree_dirty(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        own = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
        user = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *user, *arguments], cwd=tmp_path, check=True, capture_output=True, env=os.environ | own)

    git("init")
    module = tmp_path / "module.py"
    module.write_text("x = 1\n")
    assert _git_state(module) is None
    git("add", "module.py")
    git("commit", "-m", "first")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "labels.h5").touch()
    (tmp_path / "full.onnx").touch()
    state = _git_state(module)
    assert state is not None
    assert not state.dirty
    module.write_text("x = 2\n")
    assert (changed := _git_state(module)) is not None
    assert changed.dirty
    git("add", "module.py")
    assert (staged := _git_state(module)) is not None
    assert staged.dirty
