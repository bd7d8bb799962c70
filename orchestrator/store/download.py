"""Brings a repository's files: resumable, with one running total of bytes, every hash checked.

Above it: `pull`. Below it: httpx. (huggingface_hub starts a cut file anew in every process; we go on where it was
cut, in this process or a later one.)
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
from hostler.errors import HostlerError, ModelLoadFailed, ModelNotFound, PermissionDenied, Unavailable

from orchestrator.store.hub import Hub, RemoteFile, Snapshot, choose_files
from orchestrator.store.progress import Progress, Report
from orchestrator.store.publish import require_space
from orchestrator.store.remote_code import refuse_needed_code

_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_ATTEMPTS = 5
_BLOCK_BYTES = 2**20
_STATE = ".pull.json"
_TRANSIENT = {408, 429, 500, 502, 503, 504}


def fetch(
    hub: Hub,
    hub_id: str,
    revision: str | None,
    partial: Path,
    report: Report,
    *,
    folder: str = "",
    trust_remote_code: bool = False,
    pause: Callable[[float], None] = time.sleep,
) -> Snapshot:
    """Bring every needed file of a repository into `partial`, verified, going on from an earlier attempt.

    With a `folder` the repository is that folder.

    Raises:
        ModelNotFound, PermissionDenied, InvalidRequest: this can never work as asked.
        Unavailable: the network failed; what has arrived stays for the next attempt.
        ModelLoadFailed: a file arrived damaged (it is removed), or the disk is full.
    """
    snapshot = hub.snapshot(hub_id, revision).within(folder)
    sides, weights = choose_files(snapshot, trust_remote_code)
    _prepare(partial, snapshot, [*sides, *weights])
    total = sum(file.num_bytes for file in (*sides, *weights))
    require_space(partial, total - sum(_bytes_there(partial, file) for file in (*sides, *weights)))
    done = 0
    with httpx.Client(follow_redirects=True, timeout=_TIMEOUT) as client:
        for group in (sides, weights):
            for file in group:
                url, headers = hub.url_and_headers(snapshot, file.path)
                transfer = _Transfer(client, url, headers, file, partial, pause)

                def advance(num_bytes: int, before: int = done, path: str = file.path) -> None:
                    report(Progress("download", before + num_bytes, total, path))

                transfer.run(advance)
                done += file.num_bytes
            if group is sides and not trust_remote_code and (partial / "config.json").is_file():
                # Before the gigabytes, not after.
                refuse_needed_code(hub_id, partial)
    return snapshot


def _prepare(partial: Path, snapshot: Snapshot, files: list[RemoteFile]) -> None:
    """Keep what an earlier attempt at this very commit left; drop anything else."""
    state = partial / _STATE
    wanted_state = {"hub_id": snapshot.hub_id, "commit": snapshot.commit}
    try:
        known = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if known != wanted_state:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        state.write_text(json.dumps(wanted_state), encoding="utf-8")
    wanted = {file.path for file in files}
    for path in list(partial.rglob("*")):
        if path.is_file() and not path.name.startswith(".") and str(path.relative_to(partial)) not in wanted:
            path.unlink()


def _incomplete(partial: Path, file: RemoteFile) -> Path:
    path = partial / file.path
    return path.with_name(f".{path.name}.incomplete")


def _bytes_there(partial: Path, file: RemoteFile) -> int:
    for path in (partial / file.path, _incomplete(partial, file)):
        if path.is_file():
            return min(path.stat().st_size, file.num_bytes)
    return 0


@dataclass(slots=True)
class _Transfer:
    """One file on its way into the partial directory."""

    client: httpx.Client
    url: str
    headers: dict[str, str]
    file: RemoteFile
    partial: Path
    pause: Callable[[float], None]

    def run(self, advance: Callable[[int], None]) -> None:
        """Bring the file and give it its name once its hash is right; `advance` is told the bytes so far."""
        target, incomplete = self.partial / self.file.path, _incomplete(self.partial, self.file)
        if target.is_file() and target.stat().st_size == self.file.num_bytes:
            advance(self.file.num_bytes)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with incomplete.open("a+b") as out:
            if out.tell() > self.file.num_bytes:
                out.truncate(0)
            self._bring(out, advance)
        if not self._is_genuine(incomplete):
            incomplete.unlink()
            raise ModelLoadFailed(
                f"{self.file.path} arrived damaged: its hash is not the one that the Hub announces. "
                "It was removed; pull again."
            )
        incomplete.rename(target)
        advance(self.file.num_bytes)

    def _bring(self, out: IO[bytes], advance: Callable[[int], None]) -> None:
        failures = 0
        out.seek(0, 2)
        while (start := out.tell()) < self.file.num_bytes:
            cause = "the connection was closed early"
            try:
                self._stream(out, advance)
            except (httpx.HTTPError, _Transient) as error:
                cause = str(error) or type(error).__name__
            out.flush()
            # A connection that brought something was worth having; only fruitless ones count.
            failures = 0 if out.tell() > start else failures + 1
            if failures >= _ATTEMPTS:
                raise Unavailable(
                    f"The download of {self.file.path} stopped at {out.tell()} of {self.file.num_bytes} bytes "
                    f"({cause}). Pull again to go on from there."
                )
            if failures:
                self.pause(0.5 * 2**failures)

    def _stream(self, out: IO[bytes], advance: Callable[[int], None]) -> None:
        start = out.tell()
        # No compression: offsets must count the file's own bytes.
        headers = {**self.headers, "accept-encoding": "identity"}
        if start:
            headers["range"] = f"bytes={start}-"
        with self.client.stream("GET", self.url, headers=headers) as response:
            if response.status_code not in (200, 206):
                raise _refusal(response.status_code, self.file.path)
            # A server that ignores ranges sends everything again: pass over what we have.
            skip = start if response.status_code == 200 else 0
            # No chunk size: gathering chunks would lose the last ones when the connection is cut.
            for block in response.iter_raw():
                fresh = block[skip:]
                skip -= len(block) - len(fresh)
                out.write(fresh[: self.file.num_bytes - out.tell()])
                advance(out.tell())

    def _is_genuine(self, path: Path) -> bool:
        if self.file.sha256 is not None:
            digest, expected = hashlib.sha256(), self.file.sha256
        elif self.file.git_sha1 is not None:
            digest, expected = hashlib.sha1(usedforsecurity=False), self.file.git_sha1
            digest.update(b"blob %d\0" % self.file.num_bytes)
        else:
            return True
        return _hexdigest(path, digest) == expected


def _hexdigest(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return str(digest.hexdigest())


class _Transient(Exception):
    """An answer that another try may better."""


def _refusal(status: int, path: str) -> Exception:
    failure: HostlerError
    if status in _TRANSIENT:
        return _Transient(f"HTTP {status}")
    if status in (401, 403):
        failure = PermissionDenied(f"The Hub refuses {path} (HTTP {status}). Set HF_TOKEN to a token that may read it.")
    elif status == 404:
        failure = ModelNotFound(f"The Hub no longer has {path}.")
    else:
        failure = Unavailable(f"The Hub answered HTTP {status} for {path}. Pull again later.")
    return failure
