"""Paths and URIs: the one conversion between a path and a SQLite URI, and the one redaction of passwords."""

import os
import re
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, quote_plus, unquote, unquote_plus

_SQLITE = re.compile(r"sqlite(\+\w+)?:///(?P<database>[^?]*)(\?(?P<query>.*))?", re.DOTALL)


_ENCODED = re.compile(r"[%?{}\x00-\x1f\x7f]")
# `%` and `?` have a meaning in the URI, `{` and `}` in Optuna's, which fills in a template. All else stands for itself.


HIDDEN = "***"
"""What stands where a password was."""


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


_MIN_SECRET = 4
# Shorter ones are hidden within URIs alone: as plain text they would be found in half of all words.


_USERINFO = re.compile(r"(?P<head>[a-zA-Z][\w+.-]*://[^\s/:@'\"<>\[]*):(?!PASSWORD@)[^\s'\"<>]*@")


_SECRET_KEY = re.compile(
    r"pass|pwd|secret|token|credential|signature|api_?key|access_?key|odbc_connect|authorization", re.IGNORECASE
)


_QUERY = re.compile(r"(?P<head>(?<=[?&;])(?P<key>[^\s?&;='\"]+)=)(?P<value>[^\s&'\"<>]+)")


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite URI, percent-decoded as SQLAlchemy (2.1) and MLflow do it.

    None for any other URI, for a database in memory, and for one that SQLite itself opens by a `file:` URI.
    """
    match = _SQLITE.fullmatch(uri)
    database = "" if match is None else unquote(match["database"])
    return None if database in ("", ":memory:") or database.startswith("file:") else Path(database)


def sqlite_uri(path: Path, query: str = "") -> str:
    """The URI of the SQLite file `path` (made absolute) for SQLAlchemy, MLflow and Optuna; `query` is put behind it.

    A path without `%`, `?`, `{`, `}` and control characters stands as it is. Otherwise these are percent-encoded and
    the driver is named: for `sqlite:///` MLflow makes the parent folder of the path as it is before it is decoded.
    """
    plain = str(path.absolute())
    encoded = _ENCODED.sub(lambda match: quote(match[0]), plain)
    scheme = "sqlite" if encoded == plain else "sqlite+pysqlite"
    return f"{scheme}:///{encoded}" + (f"?{query}" if query else "")


def absolute_sqlite_uri(uri: str) -> str:
    """`uri` with an absolute path if it is that of a SQLite file, so that a later change of folder moves nothing."""
    path, match = sqlite_path(uri), _SQLITE.fullmatch(uri)
    return uri if path is None or match is None else sqlite_uri(path, match["query"] or "")


def has_bare_special_characters(uri: str) -> bool:
    """Whether user name or password hold a character that ends them too early: `@`, `/`, `?` or `#`, not encoded.

    Such a URI is read in different ways by different libraries, which then show parts of the password as a host.
    """
    _, found, rest = uri.partition("://")
    if not found or "@" not in rest:
        return False
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" not in authority:
        # A host, perhaps with a port, and an @ in path or query; or a password that was cut off.
        return ":" in authority and not authority.rpartition(":")[2].isdigit() and not authority.startswith("[")
    return authority.count("@") > 1 or "@" in rest[len(authority) :].partition("?")[0]


def redact(text: str) -> str:
    """`text` without the passwords and tokens in its URIs, and without those that the environment holds."""
    text = _USERINFO.sub(rf"\g<head>:{HIDDEN}@", text)
    text = _QUERY.sub(_hide_value, text)
    values = tuple(os.environ.get(name, "") for name in (*_URI_VARIABLES, *_SECRET_VARIABLES))
    pattern = _secrets(values)
    return text if pattern is None else pattern.sub(HIDDEN, text)


def _hide_value(match: re.Match[str]) -> str:
    return f"{match['head']}{HIDDEN}" if _SECRET_KEY.search(unquote(match["key"])) else match[0]


@lru_cache(maxsize=64)
def _secrets(values: tuple[str, ...]) -> re.Pattern[str] | None:
    """What finds the secrets of these values of environment variables, however they are encoded."""
    found: set[str] = set(values[len(_URI_VARIABLES) :])
    for uri in values[: len(_URI_VARIABLES)]:
        rest = uri.partition("://")[2]
        userinfo, at, _ = rest.rpartition("@")
        own: set[str] = {userinfo.partition(":")[2]} if at else set()
        for part in re.split("[?&;]", rest)[1:]:
            key, _, value = part.partition("=")
            if _SECRET_KEY.search(unquote(key)):
                own.add(value)
        # What the URI shows in clear besides is no secret: user mlflow, password mlflow, database mlflow.
        clear = userinfo.partition(":")[0] + rest[len(userinfo) :].partition("?")[0]
        found |= {secret for secret in own if secret and unquote(secret) not in unquote(clear)}
    spellings: set[str] = set()
    for secret in found:
        for plain in {secret, unquote(secret), unquote_plus(secret)}:
            spellings |= {plain, quote(plain, safe=""), quote(plain), quote_plus(plain)}
    long = sorted((text for text in spellings if len(text) >= _MIN_SECRET), key=len, reverse=True)
    return re.compile("|".join(rf"(?<!\w){re.escape(text)}(?!\w)" for text in long)) if long else None
