"""All keys that open this gateway, as they are now. Above: `doors`, `services`; below: `hostler.keys`, `caller`.

The key file is looked at four times a second, by its stat alone, and read again when that has changed. A file that is
broken or unreadable keeps the keys that were last good, and the log says so once for each state of the file.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hostler.keys import Key, KeyFile, KeysError

from gateway.auth import KEYLESS_SCOPE, KeyCheck, presented_keys, scope_of_key
from gateway.keys.caller import Caller

log = logging.getLogger(__name__)

LOOK_S = 0.25
"""How often the key file is looked at."""

KEYLESS = Caller(name="", key_id="", cache_scope=KEYLESS_SCOPE)


class KeyRing:
    """The configured key and those of the key file. For the event loop's thread only.

    Attributes:
        demands: whether a caller needs a key at all.
        on_end: called with the id of a key that has been revoked or has expired.
    """

    def __init__(self, api_key: str | None, path: Path | None, *, demands: bool) -> None:
        self.demands = demands
        self.on_end: Callable[[str], None] = lambda key_id: None
        self._own = KeyCheck(api_key) if api_key else None
        self._own_caller = Caller("api_key", "", self._own.own_scope) if self._own else KEYLESS
        self._file = KeyFile(path) if path else None
        self._callers: dict[bytes, Caller] = {}
        self._seen: tuple[int, ...] | None = None
        self.refresh()

    @property
    def is_empty(self) -> bool:
        """Whether no key at all would open."""
        now_s = time.time()
        return self._own is None and not any(c.key and c.key.lives(now_s) for c in self._callers.values())

    def caller(self, headers: Sequence[tuple[bytes, bytes]], *, demands: bool | None = None) -> Caller | None:
        """Return who presents these headers; None if a key is demanded and none that is valid is among them.

        Where none is demanded, an unknown key counts as none: clients send "unused". `demands`: of this door, which may
        be stricter than the server's own.
        """
        if self._own is not None and self._own.allows(headers):
            return self._own_caller
        if self._callers:
            for presented in presented_keys(headers):
                digest = hashlib.sha256(presented).digest()
                caller = self._callers.get(digest)
                if caller is None or caller.key is None:
                    continue
                # The table finds by a hash that nobody can aim at; the comparison that decides takes equal time.
                if hmac.compare_digest(bytes.fromhex(caller.key.digest), digest) and caller.key.lives(time.time()):
                    return caller
        return None if (self.demands if demands is None else demands) else KEYLESS

    def refresh(self) -> None:
        """Look at the file; take in what has changed, and tell of keys that have ended."""
        before = {caller.key_id for caller in self._callers.values()}
        if self._file is not None and (state := _state(self._file.path)) != self._seen:
            self._seen = state
            try:
                self._callers = {bytes.fromhex(key.digest): _caller(key) for key in self._file.read()}
            except (KeysError, OSError) as error:
                log.error("key file not taken; the keys before it go on", extra={"problem": str(error)})
        now_s = time.time()
        living = {c.key_id for c in self._callers.values() if c.key is not None and c.key.lives(now_s)}
        self._callers = {digest: c for digest, c in self._callers.items() if c.key_id in living}
        for key_id in before - living:
            log.info("key ended", extra={"key_id": key_id})
            self.on_end(key_id)

    async def watch(self) -> None:
        """Refresh for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.refresh()


def _caller(key: Key) -> Caller:
    models = None if key.models is None else tuple(key.models)
    scope = scope_of_key(bytes.fromhex(key.digest))
    return Caller(key.name, key.id, scope, frozenset(key.scopes), models, key)


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_mtime_ns, info.st_ctime_ns, info.st_size, info.st_ino
