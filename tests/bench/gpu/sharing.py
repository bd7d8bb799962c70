"""One card for many: three models inside their budgets, and a stranger's memory seen by the orchestrator.

Above: the steps. Below: the engine, the orchestrator's estimate of a model, its view of devices.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.engine import request
from workers.engine import Finish, LoadSpec

from .found import Failed, Found, NotRun, Setting, say
from .needs import INVENTORY, missing
from .running import environment
from .shapes import SHARER, build
from .speed import opened

if TYPE_CHECKING:
    from workers.text.engine import TextEngine

_MODELS, _STREAMS, _NEW_TOKENS, _PROMPT_TOKENS = 3, 8, 48, 200
_KV_BYTES = 2**29
_STRANGER_SHARE = 0.5
_CONTEXT_BYTES = 2 * 2**30  # what a CUDA context may hold beside an allocation
_STRANGER = """
import sys, torch
held = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device=sys.argv[2])
torch.cuda.synchronize()
print("held", flush=True)
sys.stdin.read()
"""


def three_models(setting: Setting) -> Found:
    """Open three engines, have all of them answer at once, and hold what they reserved against their budgets."""
    if not setting.is_cuda:
        raise NotRun("what is reserved on a card is torch's to tell, and there is no card")
    import torch

    folder = build(SHARER, Path(setting.folder) / "sharer", setting.device)
    return asyncio.run(
        share(folder, setting.device, budget_bytes(folder), lambda: torch.cuda.memory_reserved(setting.device))
    )


def budget_bytes(folder: Path) -> int:
    """Return what the orchestrator sets aside for a model on a GPU: weights, cache, room to work."""
    from orchestrator.store.footprint import footprint

    estimate = footprint(folder, "bfloat16")
    return estimate.weight_bytes + _KV_BYTES + estimate.workspace_bytes


async def share(folder: Path, device: str, budget: int, reserved_bytes: Callable[[], int]) -> Found:
    """Have three engines of the model in `folder`, each with a budget, answer one after another and all at once.

    Raises:
        Failed: one reserved more than its budget, or did not answer everything.
    """
    grown: list[int] = []
    async with AsyncExitStack() as stack:
        engines: list[TextEngine] = []
        for index in range(_MODELS):
            say(f"  model {index + 1} of {_MODELS}")
            before = reserved_bytes()
            spec = LoadSpec(f"sharer-{index}", str(folder), (device,), "bfloat16", kv_cache_bytes=_KV_BYTES)
            engine = await stack.enter_async_context(opened(spec))
            engines.append(engine)
            alone = await _replies(engine)
            if len(alone) != _STREAMS:
                raise Failed(f"model {index + 1} alone answered {len(alone)} of {_STREAMS} requests")
            grown.append(reserved_bytes() - before)
        together = await asyncio.gather(*(_replies(engine) for engine in engines))
        reserved = reserved_bytes()
    if any(len(replies) != _STREAMS for replies in together):
        raise Failed("a model that shares the card did not answer everything")
    told = f"{reserved / 2**30:.2f} GiB reserved, budgets {_MODELS * budget / 2**30:.2f} GiB"
    if reserved > _MODELS * budget or max(grown) > budget:
        each = ", ".join(f"{size / 2**30:.2f}" for size in grown)
        raise Failed(f"{_MODELS} models, {told}; they took {each} GiB one by one, of {budget / 2**30:.2f} each")
    found = Found(figures={"sharing_reserved_bytes": reserved, "sharing_budget_bytes": _MODELS * budget})
    found.add(f"{_MODELS} models on one card", told)
    return found


async def _replies(engine: TextEngine) -> list[int]:
    """Return how many tokens each of several replies at once has."""

    async def one(number: int) -> int:
        async for event in engine.generate(request(engine, number, _PROMPT_TOKENS, _NEW_TOKENS)):
            if isinstance(event, Finish):
                return event.num_completion_tokens
        return 0

    counts = await asyncio.gather(*(one(number) for number in range(_STREAMS)))
    return [count for count in counts if count == _NEW_TOKENS]


def stranger(setting: Setting) -> Found:
    """Have another program take half of the card, and look at it with the orchestrator's eyes."""
    if not setting.is_cuda:
        raise NotRun("there is no card for a stranger to take")
    if lacking := missing(INVENTORY):
        raise NotRun(f"the orchestrator's view of devices needs {', '.join(lacking)}")
    import torch

    from orchestrator import devices

    index = torch.device(setting.device).index or 0
    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    card = next((device for device in devices.discover() if device.uuid == uuid), None)
    if card is None:
        raise NotRun("the driver's library does not tell of the card")

    def foreign() -> int:
        return devices.foreign_bytes([card], {os.getpid()}, {}).get(card.id, 0)

    wanted = int(min(card.total_bytes * _STRANGER_SHARE, torch.cuda.mem_get_info(index)[0] * 0.9))
    before = foreign()
    # Not an allocation of ours: a program of its own, which ends when its input does.
    command = [sys.executable, "-c", _STRANGER, str(wanted), setting.device]
    program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment())
    try:
        assert program.stdout is not None
        if b"held" not in program.stdout.readline():
            raise Failed("the other program could not take its memory")
        seen = foreign() - before
    finally:
        program.kill()
        program.communicate()
    return seen_rightly(wanted, seen, foreign() - before)


def seen_rightly(taken: int, seen: int, left: int) -> Found:
    """Return what was seen of a stranger's memory while it was held, and after.

    Raises:
        Failed: less or much more than was taken, or it is still seen although the stranger is gone.
    """
    told = f"{seen / 2**30:.1f} GiB seen of {taken / 2**30:.1f} taken, {left / 2**30:.1f} after it ended"
    if not taken <= seen <= taken + _CONTEXT_BYTES or left > _CONTEXT_BYTES:
        raise Failed(told)
    found = Found(figures={"stranger_bytes": taken, "stranger_seen_bytes": seen})
    found.add("a stranger's memory, as the orchestrator sees it", told)
    return found
