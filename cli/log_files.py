"""The log files of one server: which there are, reading them from the end or on and on, keeping them small.

Above stand `cli.logs_command` and, for keeping them small, `cli.startup`; below, `cli.log_lines` and the run directory.
A process of ours writes into `logs/NAME.log` (what was before into `.log.1`), a worker into the file that Ray gave it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hostler.rundir import RunDir

MAX_BYTES = 32 * 1024 * 1024
"""Of one file; with the part before it a process keeps twice as much."""

_COPY_BYTES = 1024 * 1024
_MAX_LINE_BYTES = 64 * 1024
_WORKER = re.compile(r"worker-[0-9a-f]+-[0-9a-f]+-(\d+)\.(?:err|out)")


@dataclass(frozen=True, slots=True)
class LogFile:
    """One file and whose it is; of two of one process the older comes first."""

    process: str
    path: Path


def find(run_dir: RunDir) -> list[LogFile]:
    """Return the log files of a server's processes on this host, those of the run before included."""
    found = []
    for path in sorted(run_dir.logs.glob("*.log")):
        found += [LogFile(path.stem, old) for old in (path.with_suffix(".log.1"),) if old.exists()]
        found.append(LogFile(path.stem, path))
    workers = _worker_files(run_dir, ".1") + _worker_files(run_dir)
    return found + [LogFile(f"worker-{pid}", path) for path, pid in workers]


def _worker_files(run_dir: RunDir, suffix: str = "") -> list[tuple[Path, str]]:
    """Return the files that Ray gave its workers, each with the worker's pid."""
    paths = sorted(run_dir.path.glob(f"ray/session_2*/logs/worker-*{suffix}"))
    found = [(path, _WORKER.fullmatch(path.name.removesuffix(suffix))) for path in paths]
    return [(path, match[1]) for path, match in found if match is not None]


def lines(path: Path, num_bytes: int | None = None) -> Iterator[str]:
    """Yield the lines of a file, of its first `num_bytes` if given; one that has gone has none."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        while (num_bytes is None or file.tell() < num_bytes) and (line := file.readline(_MAX_LINE_BYTES)):
            yield line.decode("utf-8", "replace").rstrip("\r\n")


@dataclass(slots=True)
class Tail:
    """Reads on in one file: what was added since the last look, whole lines only. It may shrink or be another one."""

    file: LogFile
    offset: int = 0
    inode: int = 0
    rest: bytes = field(default=b"")

    def to_end(self) -> None:
        """Go on behind what is there now."""
        with suppress(OSError):
            status = self.file.path.stat()
            self.offset, self.inode = status.st_size, status.st_ino

    def news(self) -> list[str]:
        """Return the lines that were added."""
        try:
            with self.file.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self.inode or status.st_size < self.offset:
                    self.offset, self.inode, self.rest = 0, status.st_ino, b""
                file.seek(self.offset)
                added = file.read()
        except OSError:
            return []
        self.offset += len(added)
        whole, newline, self.rest = (self.rest + added).rpartition(b"\n")
        if len(self.rest) > _MAX_LINE_BYTES:
            whole, newline, self.rest = whole + newline + self.rest, b"\n", b""
        return whole.decode("utf-8", "replace").splitlines() if newline else []


def keep_small(run_dir: RunDir, max_bytes: int = MAX_BYTES) -> list[Path]:
    """Move what is in a file that has grown over `max_bytes` to the file before it; return those files.

    Their writers keep them open for appending, so a file is copied and emptied, not renamed. A line that is written
    between the last byte copied and the emptying, a few microseconds, is lost.
    """
    files = [path for path in run_dir.logs.glob("*.log")] + [path for path, _ in _worker_files(run_dir)]
    return [path for path in files if _size(path) > max_bytes and _move_out(path)]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _move_out(path: Path) -> bool:
    """Tell whether it could be done: a full disk is no reason to stop, and then the old part is what is given up."""
    before = path.with_name(f"{path.name}.1")
    try:
        with path.open("r+b") as source:
            try:
                with before.open("wb") as target:
                    while piece := source.read(_COPY_BYTES):
                        target.write(piece)
            except OSError:
                before.unlink(missing_ok=True)
            source.truncate(0)
    except OSError:
        return False
    return True
