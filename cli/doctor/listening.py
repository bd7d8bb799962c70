"""Which TCP sockets processes listen on, read from /proc. Above: `servers_here`; below: the kernel's files."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_LISTEN = "0A"


@dataclass(frozen=True, slots=True, order=True)
class Listener:
    """A socket that waits for connections, and who holds it."""

    address: str
    port: int
    pid: int
    command: str

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return ipaddress.ip_address(self.address).is_loopback


def parse_table(text: str) -> dict[int, tuple[str, int]]:
    """Return inode → (address, port) of the listening sockets in the text of /proc/net/tcp or tcp6."""
    found = {}
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 9 and fields[3] == _LISTEN:
            address, _, port = fields[1].partition(":")
            found[int(fields[9])] = (_address(address), int(port, 16))
    return found


def _address(digits: str) -> str:
    # 32-bit words, each in the machine's order (little-endian wherever hostler runs).
    raw = bytes.fromhex(digits)
    words = b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
    address = ipaddress.ip_address(words)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def listeners(pids: Iterable[int]) -> list[Listener] | None:
    """Return what the processes listen on; None where /proc does not tell (not Linux)."""
    sockets: dict[int, tuple[str, int]] = {}
    try:
        for table in ("tcp", "tcp6"):
            path = Path("/proc/net", table)
            if path.exists():
                sockets |= parse_table(path.read_text(encoding="ascii"))
    except OSError:
        return None
    if not Path("/proc/net/tcp").exists():
        return None
    found: dict[tuple[str, int], Listener] = {}
    for pid in sorted(pids):
        for inode in _inodes(pid):
            if inode in sockets:
                address, port = sockets[inode]
                found.setdefault((address, port), Listener(address, port, pid, _command(pid)))
    return sorted(found.values())


def _inodes(pid: int) -> list[int]:
    found = []
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            target = os.readlink(entry.path)
            if target.startswith("socket:["):
                found.append(int(target[8:-1]))
    except OSError:
        pass  # it ended meanwhile, or is another user's
    return found


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "?"
    names = [Path(word.decode("utf-8", "replace")).name for word in words if word and not word.startswith(b"-")]
    return " ".join(names[:3])[:60] or "?"
