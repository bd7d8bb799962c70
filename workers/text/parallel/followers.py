"""The processes of a split model's other ranks, as the first rank holds them: started, spoken to, watched, ended.

Above: `opening.py`, `runner.py`. Below: subprocesses. Each follower has a thread that starts it and waits for its end:
the kernel's "die with your parent" means the thread that forked, and this one lives exactly as long as the process.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import hostler.logs
from hostler.errors import ModelLoadFailed

import workers
from workers import memory
from workers.text.parallel.wire import Channel, Kind

log = logging.getLogger(__name__)

_END_S = 5.0
# A follower gets these and nothing else: whatever keys or tokens the worker's environment has stay with the worker.
_PASSED = frozenset({"PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD"})
_PASSED_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "NCCL_", "OMP_", "KMP_", "MKL_", "TORCH_", "PYTORCH_", "HOSTLER_LOG_")


def environment(of: dict[str, str], visible_device: str | None) -> dict[str, str]:
    """Return a follower's environment, given the worker's.

    Args:
        visible_device: the one GPU that it may see, as CUDA_VISIBLE_DEVICES spells it; None on the CPU.
    """
    passed = {name: v for name, v in of.items() if name in _PASSED or name.startswith(_PASSED_PREFIXES)}
    roots = [Path(str(module.__file__)).parents[1] for module in (workers, hostler.logs)]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {
        **passed,
        **offline,
        "PYTHONPATH": os.pathsep.join(str(root) for root in roots),
        "CUDA_VISIBLE_DEVICES": visible_device or "",
    }


def visible_devices(devices: Iterable[str], of: dict[str, str]) -> list[str | None]:
    """Return how CUDA_VISIBLE_DEVICES must name each of a process's devices so that another process sees it alone.

    Args:
        devices: "cpu" or "cuda:N", as this process numbers them.
        of: this process's environment, whose own CUDA_VISIBLE_DEVICES that numbering follows.
    """
    own = [name.strip() for name in of.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    indices = [None if name == "cpu" else int(name.partition(":")[2] or 0) for name in devices]
    return [None if index is None else own[index] if own else str(index) for index in indices]


class Follower:
    """One process, its thread and the socket to it.

    Args:
        env: of the process.
        ended: called in its thread when the process has ended, with its exit status.
    """

    def __init__(self, rank: int, env: dict[str, str], ended: Callable[[Follower, int], None]) -> None:
        self.rank = rank
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours)
        self._ended = ended
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._live, args=(env, theirs), daemon=True, name=f"rank {rank}")
        self._thread.start()

    def _live(self, env: dict[str, str], theirs: socket.socket) -> None:
        status = -1
        try:
            command = [sys.executable, "-P", "-m", "workers.text.parallel.follower"]
            with theirs:
                self._process = subprocess.Popen(
                    [*command, "--socket", str(theirs.fileno()), "--parent", str(os.getpid())],
                    env=env,
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    process_group=0,  # so that a terminal's interrupt reaches the worker alone
                )
            memory.count_in(self._process.pid)
            status = self._process.wait()
            memory.leave_out(self._process.pid)
        except OSError as error:
            log.error("follower not started", extra={"rank": self.rank, "reason": str(error)})
        finally:
            self._ended(self, status)

    @property
    def pid(self) -> int:
        """Its process id; 0 when it was never started."""
        return 0 if self._process is None else self._process.pid

    def close(self) -> None:
        """End it: by the socket, else by force. Blocking: a moment."""
        self.channel.close()
        self._thread.join(_END_S)
        if self._thread.is_alive() and self._process is not None:
            log.warning("follower killed", extra={"rank": self.rank, "pid": self._process.pid})
            os.killpg(self._process.pid, signal.SIGKILL)
            self._thread.join(_END_S)


class Followers:
    """All followers of one model. Used by one thread at a time.

    Args:
        environments: one for each, from rank 1.
        on_lost: called with the reason, once, from any thread, when one of them ends or fails after `serve` and before
            `close`. The model cannot go on then, and this process may be stuck in a collective: end it.
    """

    def __init__(self, environments: Iterable[dict[str, str]], on_lost: Callable[[str], None]) -> None:
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._serving = self._lost = False
        self._ended: list[str] = []
        self._all = [Follower(rank, env, self._note_end) for rank, env in enumerate(environments, start=1)]

    @property
    def pids(self) -> list[int]:
        """Their process ids."""
        return [follower.pid for follower in self._all]

    def tell(self, kind: Kind, fields: Iterable[dict[str, Any]]) -> None:
        """Send each its own fields.

        Raises:
            ModelLoadFailed: one is gone.
        """
        for follower, own in zip(self._all, fields, strict=True):
            try:
                follower.channel.tell(kind, **own)
            except OSError as error:
                raise self._gone(follower) from error

    def expect(self, kind: Kind) -> list[dict[str, Any]]:
        """Return what each of them tells next, which must be of this kind. Blocking until all have, or one ends.

        Raises:
            ModelLoadFailed: one failed or ended; says why, where it said so.
        """
        return [self._expect(follower, kind) for follower in self._all]

    def _expect(self, follower: Follower, kind: Kind) -> dict[str, Any]:
        try:
            frame = follower.channel.receive()
        except OSError as error:
            raise self._gone(follower) from error
        if frame is None:
            raise self._gone(follower)
        got, body = frame
        fields: dict[str, Any] = json.loads(body or b"{}")
        if got is Kind.FAILED:
            raise ModelLoadFailed(str(fields["message"]))
        assert got is kind, f"{got.name} instead of {kind.name}"
        return fields

    @staticmethod
    def _gone(follower: Follower) -> ModelLoadFailed:
        return ModelLoadFailed(
            f"The process of part {follower.rank} of the model ended while it loaded; see the worker's log."
        )

    def serve(self, send_timeout_s: float) -> None:
        """From now on the end of any of them is a loss."""
        with self._lock:
            self._serving = True
            ended = list(self._ended)
        for follower in self._all:
            follower.channel.limit(send_timeout_s)
        if ended:
            self.lost(ended[0])

    def step(self, body: bytes) -> None:
        """Send all of them one step.

        Raises:
            OSError: one does not take it.
        """
        for follower in self._all:
            follower.channel.send(Kind.STEP, body)

    def resize(self, num_blocks: int, kept: Mapping[int, int]) -> bool:
        """Resize everybody's cache; return whether all had room.

        Raises:
            OSError, ModelLoadFailed: one is gone.
        """
        fields = {"num_blocks": num_blocks, "kept": sorted(kept.items())}
        for follower in self._all:
            follower.channel.tell(Kind.RESIZE, **fields)
        return all([bool(told["done"]) for told in self.expect(Kind.RESIZED)])

    def lost(self, reason: str) -> None:
        """Tell the owner, once, that the model cannot go on."""
        with self._lock:
            tell = self._serving and not self._lost
            self._lost = self._lost or tell
        if tell:
            log.critical("split model lost", extra={"reason": reason})
            self._on_lost(reason)

    def _note_end(self, follower: Follower, status: int) -> None:
        reason = f"the process of rank {follower.rank} ended with status {status}"
        with self._lock:
            self._ended.append(reason)
        self.lost(reason)

    def close(self) -> None:
        """End all of them; it is no loss."""
        with self._lock:
            self._serving = False
        for follower in self._all:
            follower.channel.close()
        for follower in self._all:
            follower.close()
