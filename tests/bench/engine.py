"""The text engine by itself, without HTTP, gRPC or Ray: decode step at several batch sizes, and prefill.

    python -m tests.bench.engine [--rows 1,4,16] [--steps N] [--set dtype=float32] [--set num_threads=2] [--json]

Above: a reader at a terminal, `tests.bench` for the parts of a step. Below: the text engine's public face. The
difference to `tests.bench` is what the way through worker, gateway and socket costs.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.table import Table

from workers.engine import Engine, EngineStats, Finish, GenerationRequest, LoadSpec, SamplingParams, TokenPrompt
from workers.text.engine import TextEngine
from workers.text.opening import open_text_engine

MODEL = "SmolLM2-135M-Instruct"
PROMPT_TOKENS = 90
LONG_PROMPT_TOKENS = 1024
_FIRST_ORDINARY_ID = 300  # below are control tokens and single bytes in the vocabularies that we know


class Measured(Engine, Protocol):
    """An engine that keeps account of its steps."""

    def step_seconds(self) -> dict[str, float]:
        """Return where the time of all steps since the last call went."""


@dataclass(frozen=True, slots=True)
class DecodeFigures:
    """Decoding with `rows` requests in the batch, between the last one's first token and the first one's end.

    Attributes:
        step_ms: mean time of a step, by the engine's own count of steps.
        tokens_per_s: of all rows, by its count of tokens; above rows / step where steps yield several tokens.
        parts_ms: where a step's time goes, by the engine's own account.
    """

    rows: int
    step_ms: float
    tokens_per_s: float
    parts_ms: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PrefillFigures:
    """Taking in `num_prompts` prompts at once, from the request to the last first token."""

    num_prompts: int
    num_tokens: int
    tokens_per_s: float


def spec_with(spec: LoadSpec, settings: Sequence[str]) -> LoadSpec:
    """Return `spec` with `field=value` settings applied, each value read as its field's type.

    Raises:
        ValueError: no such field, or not a value of its type.
    """
    fields = {field.name: type(getattr(spec, field.name)) for field in dataclasses.fields(spec)}
    changes: dict[str, object] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in fields:
            raise ValueError(f"LoadSpec has no field {name!r}; it has {', '.join(fields)}")
        if fields[name] is bool:
            if value not in ("true", "false"):
                raise ValueError(f"{name} is true or false, not {value!r}")
            changes[name] = value == "true"
        else:
            changes[name] = fields[name](value)
    return dataclasses.replace(spec, **changes)  # type: ignore[arg-type]


def prompt_ids(number: int, num_tokens: int, vocab_size: int) -> list[int]:
    """Return a prompt that shares nothing with any other number's."""
    return random.Random(number).choices(range(_FIRST_ORDINARY_ID, vocab_size), k=num_tokens)


def request(engine: Measured, number: int, num_prompt_tokens: int, max_tokens: int) -> GenerationRequest:
    """Return a greedy request with a prompt of its own."""
    ids = prompt_ids(number, num_prompt_tokens, engine.facts.vocab_size)
    greedy = SamplingParams(temperature=0.0, ignore_eos=True)
    return GenerationRequest(TokenPrompt(tuple(ids)), f"bench-{number}", greedy, max_tokens)


async def decode(engine: Measured, rows: int, steps: int, first_number: int) -> DecodeFigures:
    """Run `rows` requests together and time the steps in which all of them decode."""
    # Those that were taken in first must still be running when the last one has had its share, and long after that:
    # what a step's parts took is read beside the running engine, and wrong by up to a step at either end.
    started_steps = 4 * rows * -(-PROMPT_TOKENS // 32)
    waiting = rows
    began: tuple[float, EngineStats] | None = None
    ended: tuple[float, EngineStats] | None = None
    parts: dict[str, float] = {}

    async def one(number: int) -> None:
        nonlocal waiting, began, ended, parts
        has_begun = False
        async for event in engine.generate(request(engine, number, PROMPT_TOKENS, steps + started_steps)):
            now = (time.perf_counter(), engine.stats())
            if not has_begun:
                has_begun = True
                waiting -= 1
                if waiting == 0:
                    began = now
                    engine.step_seconds()
            if isinstance(event, Finish) and ended is None:
                ended, parts = now, engine.step_seconds()

    await asyncio.gather(*(one(first_number + row) for row in range(rows)))
    if began is None or ended is None or ended[1].num_steps <= began[1].num_steps:
        raise RuntimeError(f"{rows} rows never decoded all at once: one ended before the last began")
    spent_s = ended[0] - began[0]
    num_steps = ended[1].num_steps - began[1].num_steps
    num_tokens = ended[1].num_completion_tokens_total - began[1].num_completion_tokens_total
    parts_ms = {name: seconds / num_steps * 1e3 for name, seconds in parts.items()}
    return DecodeFigures(rows, spent_s / num_steps * 1e3, num_tokens / spent_s, parts_ms)


async def prefill(engine: Measured, num_prompts: int, num_tokens: int, first_number: int) -> PrefillFigures:
    """Send prompts that ask for one token each, and time them."""

    async def one(number: int) -> None:
        async for _ in engine.generate(request(engine, number, num_tokens, 1)):
            pass

    began_s = time.perf_counter()
    await asyncio.gather(*(one(first_number + index) for index in range(num_prompts)))
    total = num_prompts * num_tokens
    return PrefillFigures(num_prompts, total, total / (time.perf_counter() - began_s))


async def measure(
    spec: LoadSpec, rows: Sequence[int], steps: int
) -> tuple[TextEngine, list[DecodeFigures], list[PrefillFigures]]:
    """Open the engine, measure it, close it."""
    engine = await open_text_engine(spec, lambda stage, done, total: None)
    try:
        await decode(engine, 1, 8, 1_000_000)  # warm-up
        decoded = [await decode(engine, count, steps, 10_000 * (index + 1)) for index, count in enumerate(rows)]
        prefilled = [
            await prefill(engine, 1, min(LONG_PROMPT_TOKENS, engine.facts.max_context_tokens - 1), 500_000),
            await prefill(engine, max(rows), PROMPT_TOKENS, 600_000),
        ]
        return engine, decoded, prefilled
    finally:
        await engine.close()


def main() -> int:
    """Run the benchmark; return the exit status."""
    from .floor import read_bandwidth_bytes_per_s
    from .peers import Skip, pull

    parser = argparse.ArgumentParser(prog="python -m tests.bench.engine", description="Measure the text engine alone.")
    parser.add_argument("--rows", default="1,4,16", help="batch sizes (default 1,4,16)")
    parser.add_argument("--steps", type=int, default=64, help="decode steps at each (default 64)")
    parser.add_argument("--model", default=MODEL, help=f"catalog name (default {MODEL})")
    parser.add_argument("--set", action="append", default=["dtype=bfloat16"], metavar="FIELD=VALUE", help="of LoadSpec")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    chosen = parser.parse_args()
    console = Console(stderr=chosen.json)
    try:
        model = pull(chosen.model, console.print)
        spec = spec_with(LoadSpec(model.name, str(model.path)), chosen.set)
        rows = sorted({int(part) for part in chosen.rows.split(",")})
    except (Skip, ValueError) as reason:
        console.print(str(reason), style="red", markup=False)
        return 1
    engine, decoded, prefilled = asyncio.run(measure(spec, rows, chosen.steps))
    facts = engine.facts
    floor_ms = facts.weight_bytes / read_bandwidth_bytes_per_s(max(1, spec.num_threads or 2)) * 1e3
    if chosen.json:
        figures = {"decode": decoded, "prefill": prefilled}
        document = {key: [dataclasses.asdict(item) for item in items] for key, items in figures.items()}  # type: ignore[attr-defined]
        print(json.dumps({"facts": dataclasses.asdict(facts), "floor_ms": floor_ms, **document}))
        return 0
    table = Table(title=f"{facts.model}, {facts.engine}, {facts.dtype}, {facts.weight_bytes / 1e6:.0f} MB of weights")
    for head in ("", "", "tokens/s", "of the floor"):
        table.add_column(head, justify="left" if not head else "right")
    for item in decoded:
        table.add_row(
            f"decode, {item.rows} rows",
            f"{item.step_ms:.1f} ms a step",
            f"{item.tokens_per_s:,.1f}",
            f"{floor_ms / item.step_ms:.0%}",
        )
    for taken in prefilled:
        table.add_row(
            f"prefill, {taken.num_prompts} prompts", f"{taken.num_tokens} tokens", f"{taken.tokens_per_s:,.0f}", ""
        )
    console.print(table)
    for item in decoded:
        parts = ", ".join(f"{name} {value:.2f} ms" for name, value in item.parts_ms.items())
        console.print(f"  · {item.rows} rows: {parts}", highlight=False)
    console.print(f"  · floor: every weight read once a step is {floor_ms:.1f} ms here", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
