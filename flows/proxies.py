"""The proxy variables of the environment, as Prefect's HTTP client sees them.

Loopback never goes through a proxy here. httpx prepares every proxy that the environment names when a client is made,
also one that no request of it would use, and fails where it cannot: SOCKS without the package socksio.
"""

import logging
import os
import urllib.request
from urllib.parse import urlsplit

from cmran.errors import CmranError
from cmran.utils.uris import redact

LOOPBACK = ("127.0.0.1", "localhost", "::1")

log = logging.getLogger(__name__)


def exempt_loopback() -> None:
    """Add the loopback hosts to NO_PROXY and no_proxy of this process, and keep what they have."""
    for name, other in (("NO_PROXY", "no_proxy"), ("no_proxy", "NO_PROXY")):
        # Only one of them may be set; libraries differ in which they read first.
        value = os.environ.get(name, os.environ.get(other, ""))
        hosts = [host.strip() for host in value.split(",") if host.strip()]
        # "*" means every host, and some libraries understand it only alone.
        if "*" not in hosts:
            os.environ[name] = ",".join([*hosts, *(host for host in LOOPBACK if host not in hosts)])


def proxy_of(url: str) -> str | None:
    """The variable with the proxy that a request for `url` uses, if any."""
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return _variable(parts.scheme) or _variable("all")


def described(variable: str) -> str:
    """`variable=value` without a password."""
    value = os.environ[variable]
    return f"{variable}={redact(value if '://' in value else f'http://{value}')}"


def set_aside_unusable(used_by: dict[str, str]) -> None:
    """Remove proxies from this process's environment that httpx cannot use, where nothing would go through them.

    Args:
        used_by: Variable -> URL of what the process will talk to.

    Raises:
        CmranError: One of these URLs would be asked for through such a proxy.
    """
    for variable in filter(None, (_variable(scheme) for scheme in ("http", "https", "all"))):
        problem = _problem(os.environ[variable])
        if problem is None:
            continue
        for name, url in used_by.items():
            if proxy_of(url) == variable:
                raise CmranError(
                    f"{name}={redact(url)} goes through the proxy {described(variable)}, which Prefect's client cannot "
                    f"use: {problem}, unset it, or add the host to NO_PROXY"
                )
        log.info("%s is not used: no request here needs it, and %s", described(variable), problem)
        for name in (variable.lower(), variable.upper()):
            os.environ.pop(name, None)


def _variable(scheme: str) -> str | None:
    """The variable that names the proxy of `scheme`; the lower-case one counts, and may be empty to mean none."""
    for name in (f"{scheme}_proxy", f"{scheme.upper()}_PROXY"):
        if name in os.environ:
            return name if os.environ[name] else None
    return None


def _problem(value: str) -> str | None:
    """Why httpx cannot use the proxy."""
    import httpx

    try:
        with httpx.HTTPTransport(proxy=value if "://" in value else f"http://{value}"):
            return None
    except ImportError:
        return "SOCKS needs the package socksio (`pip install socksio`)"
    except (ValueError, httpx.InvalidURL):
        return "it is no URL of a proxy"
