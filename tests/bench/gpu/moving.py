"""How fast a model moves: from files in the page cache to the device, from there to host memory, back, and over to
another worker.

Above: the steps. Below: the engine's own opening, sleep and wake.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.engine import request
from workers.engine import LoadSpec

from .floor import MOVING_GOAL, rate
from .found import Failed, Found, Setting, say
from .machine import synchronize, with_bandwidths
from .shapes import build, chosen_shape, model_folder
from .speed import spec_for

if TYPE_CHECKING:
    from workers.text.engine import TextEngine

_TIMES = 2
_READ_BYTES = 16 * 2**20


def measure(setting: Setting) -> Found:
    """Load twice, sleep and wake twice, then hand over; the last time is judged, the first told beside it."""
    figures = with_bandwidths(setting)
    shape = chosen_shape(setting)
    folder = build(shape, model_folder(setting), setting.device)
    say("  reading the files once")
    _read_all(folder)
    return asyncio.run(_measure(setting, spec_for(setting, shape), figures))


def _read_all(folder: Path) -> None:
    """Have the system hold the files in its cache."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as source:
            while source.read(_READ_BYTES):
                pass


async def _measure(setting: Setting, spec: LoadSpec, figures: dict[str, float]) -> Found:
    from workers import memory
    from workers.text.opening import open_text_engine

    spent: dict[str, list[float]] = {"load": [], "sleep": [], "wake": [], "hand over": []}

    async def timed(what: str, work: Any) -> Any:
        say(f"  {what}")
        synchronize(setting.device)
        began_s = time.perf_counter()
        result = await work
        synchronize(setting.device)
        spent[what].append(time.perf_counter() - began_s)
        return result

    for last in (False, True):
        engine = await timed("load", open_text_engine(spec, lambda *_: None))
        if not last:
            await engine.close()
            del engine
            memory.give_back()
    try:
        before = await _reply(engine)
        for _ in range(_TIMES):
            await timed("sleep", engine.sleep())
            memory.give_back()
            held = _reserved(setting)
            await timed("wake", engine.wake(spec))
            if await _reply(engine) != before:
                raise Failed("after sleep and wake the model says something else")
        if shelf := await engine.sleep():
            other = await timed("hand over", open_text_engine(replace(spec, shelf=shelf), lambda *_: None))
            same = await _reply(other) == before
            await other.close()
            if not same:
                raise Failed("taken over by another worker the model says something else")
        num_bytes = engine.facts.weight_bytes
    finally:
        await engine.close()
    return _told(setting, num_bytes, held, spent, figures)


def _told(
    setting: Setting, num_bytes: int, held: int, spent: dict[str, list[float]], figures: dict[str, float]
) -> Found:
    found = Found()
    for what, times in spent.items():
        if not times:
            continue  # Nothing is handed over where weights do not wait in host memory.
        to_device = what != "sleep"
        bus = figures["to_device_bytes_per_s" if to_device else "to_host_bytes_per_s"]
        share = num_bytes / times[-1] / bus
        found.figures |= {f"{what}_s": times[-1], f"{what}_first_s": times[0], f"{what}_share": share}
        label = {"load": "load from cached files", "hand over": "taken over by another worker"}.get(what, what)
        value = f"{times[-1]:.2f} s, {rate(num_bytes, times[-1])} (the first time {times[0]:.2f} s)"
        found.add(f"{label}, {num_bytes / 1e9:.2f} GB", value, share, MOVING_GOAL if what in ("load", "wake") else None)
    found.notices.append("Moving: shares are of the measured bandwidth between pinned host memory and the device.")
    if setting.is_cuda:
        found.figures["asleep_reserved_bytes"] = held
        found.add("reserved on the device while asleep", f"{held / 2**20:,.0f} MiB")
    return found


async def _reply(engine: TextEngine) -> str:
    """Return what the model says to a short prompt."""
    told = [event async for event in engine.generate(request(engine, 1, 12, 16))]
    return "".join(getattr(event, "text", "") for event in told)


def _reserved(setting: Setting) -> int:
    import torch

    return torch.cuda.memory_reserved(setting.device) if setting.is_cuda else 0
