"""Conversion between paths and SQLite URIs, and redaction of passwords."""

import os
import re
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, quote_plus, unquote, unquote_plus

_SQLITE = re.compile(r"sqlite(\+\w+)?:///(?P<database>[^?]*)(\?(?P<query>.*))?", re.DOTALL)


# `%` and `?` have a meaning in a URI, and `{` and `}` in Optuna, which formats the URI as a template.
_ENCODED = re.compile(r"[%?{}\x00-\x1f\x7f]")


HIDDEN = "***"
"""The text that replaces a password."""


_URI_VARIABLES = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
    "CMRAN_STUDY_STORAGE",
    "PREFECT_API_URL",
    "PREFECT_API_DATABASE_CONNECTION_URL",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL",
    *(name for proxy in ("http_proxy", "https_proxy", "all_proxy") for name in (proxy, proxy.upper())),
)


_SECRET_VARIABLES = (
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "PREFECT_API_KEY",
    "PREFECT_API_AUTH_STRING",
    "PGPASSWORD",
    "MYSQL_PWD",
)


# Shorter secrets are hidden only in URIs: as plain text they would match parts of ordinary words.
_MIN_SECRET = 4


_USERINFO = re.compile(r"(?P<head>[a-zA-Z][\w+.-]*://[^\s/:@'\"<>\[]*):(?!PASSWORD@)[^\s'\"<>]*@")


_SECRET_KEY = re.compile(
    r"pass|pwd|secret|token|credential|signature|api_?key|access_?key|odbc_connect|authorization", re.IGNORECASE
)


_QUERY = re.compile(r"(?P<head>(?<=[?&;])(?P<key>[^\s?&;='\"]+)=)(?P<value>[^\s&'\"<>]+)")


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite URI, percent-decoded in the same way as by SQLAlchemy (2.1) and MLflow.

    Returns:
        The path, or None for another URI, an in-memory database or a `file:` URI of SQLite itself.
    """
    match = _SQLITE.fullmatch(uri)
    database = "" if match is None else unquote(match["database"])
    return None if database in ("", ":memory:") or database.startswith("file:") else Path(database)


def sqlite_uri(path: Path, query: str = "") -> str:
    """The URI of a SQLite file for SQLAlchemy, MLflow and Optuna.

    `%`, `?`, `{`, `}` and control characters in the path are percent-encoded. The URI then names the driver, because
    for a plain `sqlite:///` MLflow creates the parent folder of the path before it decodes it.

    Args:
        path: The file; the URI holds its absolute path.
        query: The query string, without `?`.
    """
    plain = str(path.absolute())
    encoded = _ENCODED.sub(lambda match: quote(match[0]), plain)
    scheme = "sqlite" if encoded == plain else "sqlite+pysqlite"
    return f"{scheme}:///{encoded}" + (f"?{query}" if query else "")


def absolute_sqlite_uri(uri: str) -> str:
    """`uri` with an absolute path if it names a SQLite file, so that it stays valid in another working directory."""
    path, match = sqlite_path(uri), _SQLITE.fullmatch(uri)
    return uri if path is None or match is None else sqlite_uri(path, match["query"] or "")


def has_bare_special_characters(uri: str) -> bool:
    """Whether the user name or password contains an unencoded `@`, `/`, `?` or `#`.

    Libraries parse such a URI differently and may show parts of the password as the host.
    """
    _, found, rest = uri.partition("://")
    if not found or "@" not in rest:
        return False
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" not in authority:
        # Either a host with an optional port and an @ in the path or query, or a password that is cut off.
        return ":" in authority and not authority.rpartition(":")[2].isdigit() and not authority.startswith("[")
    return authority.count("@") > 1 or "@" in rest[len(authority) :].partition("?")[0]


def redact(text: str) -> str:
    """Replace the passwords and tokens in the URIs of `text`, and those of the environment, by `***`."""
    text = _USERINFO.sub(rf"\g<head>:{HIDDEN}@", text)
    text = _QUERY.sub(_hide_value, text)
    values = tuple(os.environ.get(name, "") for name in (*_URI_VARIABLES, *_SECRET_VARIABLES))
    pattern = _secrets(values)
    return text if pattern is None else pattern.sub(HIDDEN, text)


def _hide_value(match: re.Match[str]) -> str:
    return f"{match['head']}{HIDDEN}" if _SECRET_KEY.search(unquote(match["key"])) else match[0]


@lru_cache(maxsize=64)
def _secrets(values: tuple[str, ...]) -> re.Pattern[str] | None:
    """A pattern for the secrets in these values of environment variables, in every encoding."""
    found: set[str] = set(values[len(_URI_VARIABLES) :])
    for uri in values[: len(_URI_VARIABLES)]:
        rest = uri.partition("://")[2]
        userinfo, at, _ = rest.rpartition("@")
        own: set[str] = {userinfo.partition(":")[2]} if at else set()
        for part in re.split("[?&;]", rest)[1:]:
            key, _, value = part.partition("=")
            if _SECRET_KEY.search(unquote(key)):
                own.add(value)
        # Text that is also visible elsewhere in the URI is not secret: user mlflow, password mlflow, database mlflow.
        visible = userinfo.partition(":")[0] + rest[len(userinfo) :].partition("?")[0]
        found |= {secret for secret in own if secret and unquote(secret) not in unquote(visible)}
    spellings: set[str] = set()
    for secret in found:
        for plain in {secret, unquote(secret), unquote_plus(secret)}:
            spellings |= {plain, quote(plain, safe=""), quote(plain), quote_plus(plain)}
    long = sorted((text for text in spellings if len(text) >= _MIN_SECRET), key=len, reverse=True)
    return re.compile("|".join(rf"(?<!\w){re.escape(text)}(?!\w)" for text in long)) if long else None
