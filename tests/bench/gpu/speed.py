"""The engine's own speed on a model of a real shape: decode steps against the floor, prefill, many streams at once.

Above: the steps. Below: the engine through its public face, opened as a worker opens it.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tests.bench.engine import Measured, prefill, request
from workers.engine import Finish, LoadSpec

from .floor import DECODE_GOAL, DecodeFloor, weights_read
from .found import Failed, Found, Setting, say
from .machine import with_bandwidths
from .shapes import Shape, build, chosen_shape, measured_room, model_folder

if TYPE_CHECKING:
    from workers.text.engine import TextEngine

_ROOM_TOKENS = 1024  # that early rows may say while late ones are still taken in
_SPARE_BYTES = 6 * 10**9  # of the device's memory, beside weights and cache


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured, in rows and tokens."""

    rows: tuple[int, ...] = (1, 32)
    contexts: tuple[int, ...] = (128, 2048)
    steps: int = 64
    settle: int = 8
    prefill: int = 2048
    streams: int = 128
    stream_prompt: int = 90
    stream_new: int = 128

    @property
    def cache_tokens(self) -> int:
        """That the largest of the loads may hold at once."""
        decoding = max(self.rows) * (max(self.contexts) + _ROOM_TOKENS + self.settle + self.steps)
        streaming = self.streams * (self.stream_prompt + self.stream_new + 32)
        return max(decoding, streaming)


FULL = Sizes()
SMALL = Sizes(
    rows=(1, 4),
    contexts=(16, 64),
    steps=8,
    settle=2,
    prefill=64,
    streams=8,
    stream_prompt=6,
    stream_new=8,
)


def sizes_of(setting: Setting) -> Sizes:
    """Return what this run measures."""
    return SMALL if setting.small else FULL


def spec_for(setting: Setting, shape: Shape) -> LoadSpec:
    """Return what a worker would be told: everything else is the engine's own choice."""
    sizes = sizes_of(setting)
    kv_bytes = sizes.cache_tokens * shape.kv_bytes_per_token * (1 if setting.is_cuda else 2)
    if setting.is_cuda:
        kv_bytes = min(kv_bytes, max(2**30, measured_room(setting).device - shape.weight_bytes - _SPARE_BYTES))
    return LoadSpec(
        model=shape.name,
        path=str(model_folder(setting)),
        devices=(setting.device,),
        dtype="bfloat16" if setting.is_cuda else "float32",
        max_running=max(sizes.streams, *sizes.rows),
        kv_cache_bytes=kv_bytes,
    )


@asynccontextmanager
async def opened(spec: LoadSpec) -> AsyncIterator[TextEngine]:
    """Open an engine, and close it and give back its memory in the end."""
    from workers import memory
    from workers.text.opening import open_text_engine

    engine = await open_text_engine(spec, lambda *_: None)
    try:
        yield engine
    finally:
        await engine.close()
        del engine
        memory.give_back()


@dataclass(frozen=True, slots=True)
class Window:
    """Steps in which all rows decode, and nobody's prompt is taken in.

    Attributes:
        kv_bytes: that the rows held, mean of the first and the last step.
        tokens_per_step: of all rows; above the rows where guesses came true.
    """

    rows: int
    step_s: float
    kv_bytes: float
    tokens_per_step: float
    parts_ms: dict[str, float]


async def decode_window(
    engine: Measured, rows: int, context: int, steps: int, settle: int, first_number: int
) -> Window:
    """Run `rows` requests with prompts of `context` tokens; time `steps` steps once all of them decode.

    Raises:
        Failed: one ended, or was sent back to the queue, before the time was up.
    """
    waiting = rows
    ready_step: int | None = None
    began: tuple[float, Any] | None = None
    ended: tuple[float, Any] | None = None
    parts: dict[str, float] = {}

    async def one(number: int) -> None:
        nonlocal waiting, ready_step, began, ended, parts
        has_begun = False
        limit = min(context + _ROOM_TOKENS + settle + steps, engine.facts.max_context_tokens - 1) - context
        async with aclosing(engine.generate(request(engine, number, context, limit))) as events:  # type: ignore[type-var]
            async for event in events:
                now, stats = time.perf_counter(), engine.stats()
                if not has_begun:
                    has_begun, waiting = True, waiting - 1
                    if waiting == 0:
                        ready_step = stats.num_steps
                if ready_step is not None and began is None and stats.num_steps >= ready_step + settle:
                    began = now, stats
                    engine.step_seconds()
                elif began is not None and ended is None and stats.num_steps >= began[1].num_steps + steps:
                    ended, parts = (now, stats), engine.step_seconds()
                if ended is not None:
                    return
                if isinstance(event, Finish):
                    raise Failed(f"of {rows} rows one ended before {steps} steps of all of them were timed")

    await asyncio.gather(*(one(first_number + row) for row in range(rows)))
    assert began is not None
    assert ended is not None
    num_steps = ended[1].num_steps - began[1].num_steps
    num_tokens = ended[1].num_completion_tokens_total - began[1].num_completion_tokens_total
    if num_tokens < 0.95 * rows * (num_steps - 1):
        raise Failed(f"of {rows} rows some stood still: {num_tokens} tokens in {num_steps} steps")
    return Window(
        rows,
        (ended[0] - began[0]) / num_steps,
        (began[1].kv_used_bytes + ended[1].kv_used_bytes) / 2,
        num_tokens / num_steps,
        {name: spent_s / num_steps * 1e3 for name, spent_s in parts.items()},
    )


async def stream_all(engine: Measured, streams: int, prompt: int, new: int, first_number: int) -> tuple[float, float]:
    """Send `streams` requests at once; return their new tokens each second, and new tokens a step."""
    before, began_s = engine.stats(), time.perf_counter()

    async def one(number: int) -> int:
        async for event in engine.generate(request(engine, number, prompt, new)):
            if isinstance(event, Finish):
                return event.num_completion_tokens
        raise Failed("a stream ended without its finish")

    counts = await asyncio.gather(*(one(first_number + index) for index in range(streams)))
    spent_s, after = time.perf_counter() - began_s, engine.stats()
    if short := [count for count in counts if count != new]:
        raise Failed(f"{len(short)} of {streams} replies are not {new} tokens long: {sorted(set(short))}")
    return sum(counts) / spent_s, sum(counts) / max(1, after.num_steps - before.num_steps)


STREAMS_FIRST_NUMBER = 700_000
"""The prompts of the measured streams are numbered from here; the peer is sent the same."""
WARM_FIRST_NUMBER = 800_000


def measure(setting: Setting) -> Found:
    """Build the model if need be, and measure the engine on it."""
    figures = with_bandwidths(setting)
    shape = chosen_shape(setting)
    build(shape, model_folder(setting), setting.device)
    return asyncio.run(_measure(setting, shape, figures["memory_bytes_per_s"]))


async def _measure(setting: Setting, shape: Shape, bandwidth_bytes_per_s: float) -> Found:
    found, sizes, spec = Found(), sizes_of(setting), spec_for(setting, shape)
    say("  opening")
    async with opened(spec) as engine:
        facts = engine.facts
        found.add("model", f"{shape.name}, {facts.dtype}, {facts.weight_bytes / 1e9:.2f} GB, runner {engine.runner}")
        embedding_bytes = shape.vocab * shape.hidden * facts.weight_bytes // max(1, facts.num_parameters)
        weight_bytes = weights_read(facts.weight_bytes, embedding_bytes, tied=shape.tied)
        number = 1_000_000
        for rows in sizes.rows:
            for context in sizes.contexts:
                say(f"  decode, {rows} rows, context {context}")
                window = await decode_window(engine, rows, context, sizes.steps, sizes.settle, number)
                number += 10_000
                floor = DecodeFloor(weight_bytes, window.kv_bytes, bandwidth_bytes_per_s)
                _tell_decode(found, window, context, floor)
        say("  prefill")
        _tell_prefill(found, sizes.prefill, await _prefills(engine, sizes.prefill))
        say(f"  {sizes.streams} streams")
        await stream_all(engine, sizes.streams, sizes.stream_prompt, sizes.stream_new, WARM_FIRST_NUMBER)
        per_s, per_step = await stream_all(
            engine, sizes.streams, sizes.stream_prompt, sizes.stream_new, STREAMS_FIRST_NUMBER
        )
        found.figures["streams_tokens_per_s"] = per_s
        what = f"{sizes.streams} streams, {sizes.stream_prompt} in, {sizes.stream_new} out"
        found.add(what, f"{per_s:,.0f} tokens/s ({per_step:.1f} a step)")
    for kind in ("int8", "int4"):
        say(f"  decode, {kind}")
        await _measure_narrow(found, sizes, replace(spec, quantize=kind), shape, bandwidth_bytes_per_s)
    return found


async def _measure_narrow(
    found: Found, sizes: Sizes, spec: LoadSpec, shape: Shape, bandwidth_bytes_per_s: float
) -> None:
    """Measure one row's steps with quantized layers."""
    async with opened(spec) as engine:
        item_bytes = 4 if engine.facts.dtype == "float32" else 2
        embedding_bytes = shape.vocab * shape.hidden * item_bytes
        weight_bytes = weights_read(engine.facts.weight_bytes, embedding_bytes, tied=shape.tied)
        context = sizes.contexts[0]
        window = await decode_window(engine, 1, context, sizes.steps, sizes.settle, 2_000_000)
        floor = DecodeFloor(weight_bytes, window.kv_bytes, bandwidth_bytes_per_s)
        _tell_decode(found, window, context, floor, spec.quantize)


async def _prefills(engine: Measured, num_tokens: int) -> Sequence[float]:
    """Return tokens/s of three prompts, after two from which the engine learns how much a step may take in."""
    rates = [(await prefill(engine, 1, num_tokens, 500_000 + index)).tokens_per_s for index in range(5)]
    return rates[2:]


def _tell_prefill(found: Found, num_tokens: int, rates: Sequence[float]) -> None:
    per_s = statistics.median(rates)
    found.figures["prefill_tokens_per_s"] = per_s
    found.add(f"prefill, {num_tokens} tokens", f"{per_s:,.0f} tokens/s")


def _tell_decode(found: Found, window: Window, context: int, floor: DecodeFloor, kind: str = "") -> None:
    key = "_".join(filter(None, (f"decode_{window.rows}_{context}", kind)))
    share = floor.share(window.step_s)
    found.figures |= {f"{key}_step_s": window.step_s, f"{key}_floor_s": floor.step_s, f"{key}_share": share}
    value = f"{window.step_s * 1e3:.2f} ms a step, floor {floor.step_s * 1e3:.2f} ms"
    rows = f"{window.rows} row" + ("s" if window.rows > 1 else "")
    what = ", ".join(filter(None, ("decode", kind, rows, f"context {context}")))
    found.add(what, value, share, None if kind else DECODE_GOAL)
    parts = ", ".join(f"{name} {ms:.2f} ms" for name, ms in window.parts_ms.items())
    per_row = window.tokens_per_step / window.rows
    found.notices.append(f"{what}: {parts}; {per_row:.2f} tokens a row and step")
