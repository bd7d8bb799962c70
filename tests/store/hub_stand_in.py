"""A loopback Hub that answers what the store asks of the real one, and misbehaves on demand.

Above it: the tests. Below it: http.server. Routes, as huggingface_hub 2.4 calls them: `GET /api/models/<id>[/revision/
<rev>]?blobs=true` and `GET /<id>/resolve/<rev>/<path>` (large files redirect to another path, as to the real CDN).
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """One model. `private` and `gated` make the server refuse it as the real one does."""

    files: dict[str, bytes]
    commit: str = COMMIT
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False

    @staticmethod
    def of(directory: Path, **extra: bytes) -> Repository:
        """Return a repository with the files of a directory."""
        return Repository({p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.is_file()} | extra)


@dataclass
class Faults:
    """What goes wrong, by file path: cut after n bytes (once), bytes flipped, statuses to answer first."""

    cut_after: dict[str, int] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)
    statuses: dict[str, list[int]] = field(default_factory=dict)
    ignore_ranges: bool = False


@dataclass
class HubStandIn:
    """What the server knows and has seen: (path, first byte asked for) of every file request."""

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)
    served: list[tuple[str, int]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet."""

    def do_HEAD(self) -> None:
        self._answer(200, b"")

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            self._bytes(self.hub.repositories[match[1]].files[match[2]], match[2])
        else:
            self._answer(404, b"")

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _info(self, hub_id: str, revision: str | None) -> None:
        repository = self.hub.repositories.get(hub_id)
        if repository is None:
            self._answer(401, b'{"error":"Invalid username or password."}', {"X-Error-Code": "RepoNotFound"})
            return
        if repository.gated:
            self._answer(403, b'{"error":"gated"}', {"X-Error-Code": "GatedRepo"})
            return
        if revision not in (None, repository.commit, *repository.revisions):
            self._answer(404, b'{"error":"no"}', {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [_sibling(path, data) for path, data in repository.files.items()]
        body = json.dumps({"id": hub_id, "modelId": hub_id, "sha": repository.commit, "siblings": siblings})
        self._answer(200, body.encode(), {"Content-Type": "application/json"})

    def _resolve(self, hub_id: str, revision: str, path: str) -> None:
        repository = self.hub.repositories[hub_id]
        if revision != repository.commit or path not in repository.files:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif _is_large(path):
            self._answer(302, b"", {"Location": f"{self.hub.url}/cdn/{hub_id}/{path}"})
        else:
            self._bytes(repository.files[path], path)

    def _bytes(self, data: bytes, path: str) -> None:
        faults = self.hub.faults
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        self.hub.served.append((path, start))
        if faults.statuses.get(path):
            self._answer(faults.statuses[path].pop(0), b"")
            return
        if path in faults.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if faults.ignore_ranges:
            start, asked = 0, None
        body = data[start:]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if (cut := faults.cut_after.pop(path, None)) is not None:
            self.wfile.write(body[:cut])
            self.close_connection = True
            return
        self.wfile.write(body)


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".onnx"))


def _sibling(path: str, data: bytes) -> dict[str, Any]:
    git_sha1 = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    sibling: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": git_sha1}
    if _is_large(path):
        sibling["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return sibling


@contextmanager
def serving() -> Iterator[HubStandIn]:
    """Serve a stand-in on a free loopback port."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub = HubStandIn(f"http://127.0.0.1:{server.server_address[1]}")
    handler.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
