"""Who may come in: key check, Host allow-list, pages' origins, as pure functions. Above: `doors`; below: nothing.

Nobody is let in for the address they come from: tunnels and browsers all arrive from 127.0.0.1. Without a key, the Host
header is what tells a local client from a web page whose name was pointed here (DNS rebinding).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from hostler.config import is_loopback

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


KEYLESS_SCOPE = "keyless"
"""Cache scope of everybody, where no key is demanded: they are all this machine's own."""


def scope_of_key(digest: bytes) -> str:
    """Return the cache scope of the callers that hold one key, from its SHA-256.

    Prompts of different scopes share no cached state in a worker, so that nobody learns from the time to a first token
    what the holder of another key has asked. Keyed with the digest, so the scope tells nothing of the key, and every
    gateway process comes to the same one.
    """
    return hmac.new(digest, b"hostler cache scope", hashlib.sha256).hexdigest()[:32]


def presented_keys(headers: Sequence[tuple[bytes, bytes]]) -> Iterator[bytes]:
    """Yield what `Authorization: Bearer` and `x-api-key` hold."""
    for name, value in headers:
        if name == b"x-api-key":
            yield value.strip()
        elif name == b"authorization" and value[:7].lower() == b"bearer ":
            yield value[7:].strip()


class KeyCheck:
    """Compares presented keys with the configured one; holds only its SHA-256."""

    def __init__(self, api_key: str) -> None:
        self._digest = hashlib.sha256(api_key.encode()).digest()
        self.own_scope = scope_of_key(self._digest)

    def allows(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """Return whether `Authorization: Bearer` or `x-api-key` holds the key, in time that says nothing about it."""
        allowed = False
        for presented in presented_keys(headers):
            allowed |= hmac.compare_digest(hashlib.sha256(presented).digest(), self._digest)
        return allowed


class Hosts(Protocol):
    """Says which names a request may call this server by."""

    def allows(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """Return whether the one Host header names this server."""


class HostCheck:
    """The Host allow-list.

    Args:
        listen_host: address that the server listens on.
        allowed_hosts: names beyond the loopback ones, with or without a port.
        has_key: an API key is demanded of everybody.
    """

    def __init__(self, listen_host: str, allowed_hosts: Iterable[str], *, has_key: bool) -> None:
        self._any = has_key and not is_loopback(listen_host)
        self._names = _LOOPBACK_NAMES | {normal_host(name) for name in allowed_hosts}

    def allows(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """Return whether the one Host header names this server."""
        if self._any:
            return True
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1:
            return False
        host = normal_host(hosts[0].decode("latin-1"))
        return host in self._names or without_port(host) in self._names


class PageCheck:
    """Tells other sites' pages from local programs, where no key is demanded (CSRF).

    A page may send forms, plain text and GETs to a local port without asking first; it never reads the reply, but the
    work is done. Browsers say who asks in `Origin` and `Sec-Fetch-Site`, which pages cannot change.

    Args:
        cors: origins that the configuration lets in, or "*".
        host_check: what counts as a name of this server.
    """

    def __init__(self, cors: Iterable[str], host_check: HostCheck) -> None:
        self._allowed = frozenset(cors)
        self._host_check = host_check

    def allows(self, method: str, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """Return whether a request may have come from a program of this machine, or from a page that is let in."""
        if "*" in self._allowed:
            return True
        origins = [value.decode("latin-1").strip() for name, value in headers if name == b"origin"]
        if origins:
            return all(self._is_local(origin) for origin in origins)
        fetch = {name: value for name, value in headers if name.startswith(b"sec-fetch-")}
        # Following a link here changes nothing, and the page that holds the link sees nothing of it.
        is_link = method == "GET" and fetch.get(b"sec-fetch-dest") == b"document"
        return is_link or fetch.get(b"sec-fetch-site") != b"cross-site"

    def _is_local(self, origin: str) -> bool:
        if origin in self._allowed:
            return True
        scheme, separator, host = origin.lower().partition("://")
        if not separator:  # "null" is what any page's sandboxed frame sends.
            return False
        if scheme not in ("http", "https"):  # tauri://, vscode-file://, file://: programs on this machine
            return True
        # Names under .localhost are this machine's in every browser; Tauri's windows on Windows have such a one.
        is_below_localhost = without_port(host).endswith(".localhost")
        return is_below_localhost or self._host_check.allows([(b"host", host.encode("latin-1"))])


def normal_host(host: str) -> str:
    """Return a Host header's value as names are compared."""
    return host.strip().lower().rstrip(".")


def without_port(host: str) -> str:
    """Return a Host header's name; what has no port, or an odd one, stays as it is."""
    name, colon, port = host.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()):
        return host
    return name.rstrip(".")
