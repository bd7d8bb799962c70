"""API keys and the file that holds them. Above: `cli` (makes, lists, revokes), `gateway` (checks); below: the disk.

A key's text is shown once, when it is made. The file holds its SHA-256: 32 random bytes need no slow hash. One JSON
document, mode 0600, replaced whole under a file lock, so that a reader sees the old keys or the new ones.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Scope = Literal["infer", "admin"]
PREFIX = "hk_"
MAX_FILE_BYTES = 1_000_000
MAX_KEYS = 1000
_SECRET_BYTES = 32
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$"


class KeysError(ValueError):
    """The key file, or what should go into it, is wrong; the message says what to do."""


class Key(BaseModel):
    """One key, without its text. None means no limit; times are seconds of the Unix epoch."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str = Field(pattern=r"^[0-9a-f]{8}$")
    name: str = Field(pattern=_NAME)
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=2)] = ["infer"]
    models: Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=256)] | None = None
    requests_per_minute: int | None = Field(default=None, ge=1, le=10**6)
    tokens_per_minute: int | None = Field(default=None, ge=1, le=10**10)
    max_streams: int | None = Field(default=None, ge=1, le=10_000)
    created_at: float = Field(ge=0, le=10**11)
    expires_at: float | None = Field(default=None, ge=0, le=10**11)

    def lives(self, now_s: float) -> bool:
        """Return whether it has not expired at a time of the Unix epoch."""
        return self.expires_at is None or now_s < self.expires_at


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    version: Literal[1] = 1
    keys: Annotated[list[Key], Field(max_length=MAX_KEYS)] = []


def default_path(environ: Mapping[str, str] | None = None) -> Path:
    """Return where the user's keys lie unless the configuration says otherwise."""
    environ = os.environ if environ is None else environ
    return Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "hostler" / "keys.json"


def digest_of(text: bytes) -> str:
    """Return what is stored of a key's text."""
    return hashlib.sha256(text).hexdigest()


class KeyFile:
    """The keys of one file. Any process of the user may read and change it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Key]:
        """Return the keys, expired ones included; none if there is no file.

        Raises:
            KeysError: it is not ours alone, too large, or not a key file.
            OSError: it cannot be read.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return []
        with os.fdopen(descriptor, "rb") as file:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise KeysError(f"{self.path} is not a file")
            if info.st_uid != os.geteuid():
                raise KeysError(f"{self.path} belongs to user {info.st_uid}, not to you")
            if stat.S_IMODE(info.st_mode) & 0o077:
                raise KeysError(f"others may read or change {self.path}. Run: chmod 600 {self.path}")
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise KeysError(f"{self.path} is larger than {MAX_FILE_BYTES} bytes")
        try:
            keys = _Document.model_validate_json(data).keys
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "the file"
            raise KeysError(f"{self.path} is not a key file: {where}: {error.errors()[0]['msg']}") from None
        if len({key.id for key in keys}) < len(keys) or len({key.digest for key in keys}) < len(keys):
            raise KeysError(f"{self.path} holds the same key twice")
        return keys

    def add(
        self,
        name: str,
        *,
        scopes: Sequence[Scope] = ("infer",),
        models: Sequence[str] | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        max_streams: int | None = None,
        lifetime_s: float | None = None,
    ) -> tuple[Key, str]:
        """Make a key; return it and its text, which is kept nowhere.

        Raises:
            KeysError: the name is taken or cannot be one, a value is out of its bounds, or the file is wrong.
            OSError: it cannot be written.
        """
        if not re.match(_NAME, name):
            raise KeysError(f"{name!r} cannot be a key's name; use up to 64 letters, digits and . _ - @")
        text = PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
        now_s = time.time()
        with self._changing():
            keys = self.read()
            if any(key.name == name for key in keys):
                raise KeysError(f"there is a key {name!r} already. Revoke it first: hostler key revoke {name}")
            if len(keys) >= MAX_KEYS:
                raise KeysError(f"{MAX_KEYS} keys are the most. Revoke some that are not used.")
            taken = {key.id for key in keys}
            identity = secrets.token_hex(4)
            while identity in taken or identity == "0" * 8:
                identity = secrets.token_hex(4)
            try:
                key = Key(
                    id=identity,
                    name=name,
                    digest=digest_of(text.encode("ascii")),
                    scopes=sorted(set(scopes), reverse=True),
                    models=list(models) if models else None,
                    requests_per_minute=requests_per_minute,
                    tokens_per_minute=tokens_per_minute,
                    max_streams=max_streams,
                    created_at=now_s,
                    expires_at=None if lifetime_s is None else now_s + lifetime_s,
                )
            except ValidationError as error:
                fault = error.errors()[0]
                raise KeysError(f"{fault['loc'][0]}: {fault['msg']}") from None
            self._write([*keys, key])
        return key, text

    def revoke(self, name_or_id: str) -> Key:
        """Remove a key and return it.

        Raises:
            KeysError: there is none of that name or id, or the file is wrong.
            OSError: it cannot be written.
        """
        with self._changing():
            keys = self.read()
            # A name may look like another key's id; the name is what people type.
            found = [key for key in keys if key.name == name_or_id] or [key for key in keys if key.id == name_or_id]
            if not found:
                raise KeysError(f"there is no key {name_or_id!r}. See: hostler key list")
            self._write([key for key in keys if key is not found[0]])
        return found[0]

    @contextmanager
    def _changing(self) -> Iterator[None]:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self.path.with_name(self.path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _write(self, keys: list[Key]) -> None:
        data = _Document(keys=keys).model_dump_json(indent=1).encode() + b"\n"
        if len(data) > MAX_FILE_BYTES:
            raise KeysError(f"{self.path} would be larger than {MAX_FILE_BYTES} bytes. Revoke keys that are not used.")
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            os.replace(draft, self.path)
        finally:
            with suppress(FileNotFoundError):
                draft.unlink()
