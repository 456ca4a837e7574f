"""Proxy settings of the environment for Prefect's HTTP client (httpx).

Connections to this machine bypass every proxy. httpx sets up all proxies of the environment when it creates a client,
even those that no request will use, and fails if it cannot: for example SOCKS without the package socksio.
"""

import logging
import os
import urllib.request
from urllib.parse import urlsplit

from cmran.errors import ConfigError
from cmran.utils.uris import redact

LOOPBACK = ("127.0.0.1", "localhost", "::1")

log = logging.getLogger(__name__)


def exempt_loopback() -> None:
    """Add the loopback hosts to NO_PROXY and no_proxy of this process; the hosts in them are kept."""
    for name, other in (("NO_PROXY", "no_proxy"), ("no_proxy", "NO_PROXY")):
        # Libraries differ in which of the two they read first, and only one may be set.
        value = os.environ.get(name, os.environ.get(other, ""))
        hosts = [host.strip() for host in value.split(",") if host.strip()]
        # "*" means every host; some libraries accept it only on its own.
        if "*" not in hosts:
            os.environ[name] = ",".join([*hosts, *(host for host in LOOPBACK if host not in hosts)])


def proxy_of(url: str) -> str | None:
    """Return the name of the variable with the proxy for `url`, or None if the request uses no proxy."""
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return _variable(parts.scheme) or _variable("all")


def shown_proxy(variable: str) -> str:
    """Return `variable=value` without a password."""
    value = os.environ[variable]
    return f"{variable}={redact(value if '://' in value else f'http://{value}')}"


def drop_unusable_proxies(urls: dict[str, str]) -> None:
    """Remove the proxies that httpx cannot use, and that are not needed, from the environment of this process.

    Args:
        urls: Variable -> URL of the servers that the process will connect to.

    Raises:
        ConfigError: One of these URLs needs such a proxy.
    """
    for variable in filter(None, (_variable(scheme) for scheme in ("http", "https", "all"))):
        problem = _problem(os.environ[variable])
        if problem is None:
            continue
        for name, url in urls.items():
            if proxy_of(url) == variable:
                raise ConfigError(
                    f"{name}={redact(url)} uses the proxy {shown_proxy(variable)}, which Prefect's client cannot use, "
                    f"because {problem}",
                    "correct or unset it, or add the host to NO_PROXY",
                )
        log.info("ignoring %s: no request needs it, and %s", shown_proxy(variable), problem)
        for name in (variable.lower(), variable.upper()):
            os.environ.pop(name, None)


def _variable(scheme: str) -> str | None:
    """Return the name of the proxy variable of `scheme`. Lower case has priority; an empty value means no proxy."""
    for name in (f"{scheme}_proxy", f"{scheme.upper()}_PROXY"):
        if name in os.environ:
            return name if os.environ[name] else None
    return None


def _problem(value: str) -> str | None:
    """Return why httpx cannot use the proxy, or None if it can."""
    import httpx

    try:
        with httpx.HTTPTransport(proxy=value if "://" in value else f"http://{value}"):
            return None
    except ImportError:
        return "SOCKS needs the package socksio (`pip install socksio`)"
    except (ValueError, httpx.InvalidURL):
        return "it is not the URL of a proxy"
