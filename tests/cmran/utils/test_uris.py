"""Conversion of SQLite URIs as by SQLAlchemy, and redaction of passwords in every encoding."""

from pathlib import Path
from urllib.parse import quote

import pytest

from cmran.errors import CmranError
from cmran.utils.uris import absolute_sqlite_uri, has_bare_special_characters, redact, sqlite_path, sqlite_uri

NAMES = [
    "plain",
    "my proj",
    "a%20b",
    "100%",
    "x#y",
    "q?z=1&w",
    'it\'s "q"',
    "ünï-日本",
    "a+b",
    "{x}",
    "a;b=c",
    "u:p@h",
    "a\nb",
]


@pytest.mark.parametrize("name", NAMES)
def test_path_survives_conversion_to_uri_and_back(name: str) -> None:
    from sqlalchemy.engine import make_url

    path = Path("/data") / name / f"{name}.db"
    for query in ("", "timeout=5"):
        uri = sqlite_uri(path, query)
        assert sqlite_path(uri) == path
        assert make_url(uri).database == str(path)
        assert make_url(uri).get_backend_name() == "sqlite"
        assert dict(make_url(uri).query) == ({"timeout": "5"} if query else {})
        assert absolute_sqlite_uri(uri) == uri
        # Optuna formats the URI as a template.
        assert uri.format(SCHEMA_VERSION=1) == uri
        assert redact(uri) == uri


@pytest.mark.parametrize("name", NAMES)
def test_uri_of_mlflow_names_the_same_path(name: str) -> None:
    from mlflow.utils.file_utils import path_to_local_sqlite_uri

    path = Path("/data") / name / "mlflow.db"
    assert sqlite_path(path_to_local_sqlite_uri(str(path))) == path


def test_relative_and_other_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_sqlite_uri("sqlite:///a%20b.db?timeout=5") == f"sqlite:///{tmp_path}/a b.db?timeout=5"
    for uri in (
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:x.db?uri=true",
        "http://h/x",
        "postgresql://h/d",
        "",
    ):
        assert sqlite_path(uri) is None
        assert absolute_sqlite_uri(uri) == uri


SECRETS = ["geheim99", "p@ss:w/o#rd", "mit leer", "100%sicher", "a+b=c&d", "ünï-pass"]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    "variable", ["MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "CMRAN_STUDY_STORAGE", "https_proxy"]
)
def test_passwords_of_the_environment_are_redacted(secret: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = quote(secret, safe="")
    for uri in (
        f"http://user:{encoded}@host:5000/x",
        f"postgresql+psycopg://user@host/db?password={encoded}",
        f"postgresql://host/db?sslmode=require&sslpassword={encoded}",
        f"https://host/?access_token={encoded}",
    ):
        monkeypatch.setenv(variable, uri)
        text = f"cannot reach {uri}: login of 'user' with '{secret}' failed (or {quote(secret)!r}) at host"
        for shown in (redact(text), str(CmranError(text))):
            assert secret not in shown
            assert encoded not in shown
            assert "host" in shown
            assert "***" in shown


def test_passwords_in_any_uri_are_redacted() -> None:
    for text in (
        "http://me:secret1@h:80/api failed",
        "'postgresql://me:sec:ret1@h/d'",
        "http://:secret1@h",
        "url: /api?x=1&api_key=secret1&y=2",
        "x?sslpassword=secret1)",
        "mssql+pyodbc:///?odbc_connect=UID%3Dx%3BPWD%3Dsecret1",
    ):
        assert "ret1" not in redact(text)
    assert redact("/api?x=1&api_key=secret1&y=2") == "/api?x=1&api_key=***&y=2"
    for text in ("http://h:80/x", "https://[::1]:80/", "see cmran --help: a=b; 12:30", "token=5 epochs", ""):
        assert redact(text) == text


def test_text_visible_elsewhere_in_the_uri_is_not_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://mlflow:mlflow@host/mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "ab")
    assert redact("MLflow (mlflow) cannot stab") == "MLflow (mlflow) cannot stab"
    assert redact("postgresql://mlflow:mlflow@host/mlflow") == "postgresql://mlflow:***@host/mlflow"


def test_unencoded_special_characters_in_a_password_are_detected() -> None:
    for bare in ("http://u:p/w@h", "http://u:p#w@h", "http://u:p?w@h", "http://u:p@w@h:5000", "http://u:p@w/x@h"):
        assert has_bare_special_characters(bare)
    for good in (
        "http://u:p%40w@h:5000/x",
        "http://h:5000/a@b",
        "http://h/a@b",
        "postgresql://h/d?x=a@b",
        "a@b",
        "http://[::1]:5/",
    ):
        assert not has_bare_special_characters(good)
