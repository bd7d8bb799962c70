"""The ranks of one split model as a torch.distributed group: gloo between CPU processes, NCCL between GPUs.

Above: `opening.py` (rank 0) and `follower.py`. Below: torch. They meet at a file in a private directory; gloo listens
on the loopback interface only. A process belongs to one such group at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# How long one collective may take. Ranks work in step, so even a slow machine's long prefill stays far below.
COLLECTIVE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Membership:
    """Which of how many ranks this process is, and its device as this process numbers it."""

    rank: int
    size: int
    device: torch.device


@contextmanager
def joined_environment(member: Membership) -> Iterator[None]:
    """Set what torch and transformers read from the environment while groups are made, and put it back.

    The interface that gloo listens on; and this process's device, by which transformers finds it.
    """
    wanted = {"GLOO_SOCKET_IFNAME": "lo", "LOCAL_RANK": str(member.device.index or 0)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def join(member: Membership, meeting: Path) -> None:
    """Meet the other ranks at `meeting`, a file that need not exist. Blocking until all are there.

    Raises:
        RuntimeError: they did not come within `COLLECTIVE_TIMEOUT_S`.
    """
    on_gpu = member.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(member.device)
    with joined_environment(member):
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.FileStore(str(meeting), member.size),  # type: ignore[attr-defined]
            rank=member.rank,
            world_size=member.size,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
            device_id=member.device if on_gpu else None,
        )


def limit_waiting(group: Any) -> None:
    """Give a group that transformers made our time-out instead of half an hour."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=COLLECTIVE_TIMEOUT_S), group)


def leave() -> None:
    """Leave the group, if this process is in one. Waits for nobody."""
    if not dist.is_initialized():
        return
    if dist.get_backend() == "nccl":
        dist.distributed_c10d._abort_process_group()  # Destroying would wait for what the others never finish.
    else:
        dist.destroy_process_group()
