"""The engine's own benchmark: its settings, and its arithmetic on an engine whose steps are counted by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

pytest.importorskip("torch")

from tests.bench.engine import decode, prefill, spec_with
from workers.engine import (
    EngineStats,
    Event,
    Finish,
    GenerationRequest,
    LoadSpec,
    ModelFacts,
    TextDelta,
    TokenPrompt,
)

SPEC = LoadSpec("m", "/nowhere")


class CountingEngine:
    """Every step yields two tokens of one request, as look-up drafts may; `order` keeps the requests as they came."""

    facts = ModelFacts("m", "text", "a", "bfloat16", 2048, vocab_size=1000)

    def __init__(self) -> None:
        self.num_steps = 0
        self.order: list[GenerationRequest] = []

    def step_seconds(self) -> dict[str, float]:
        return {"linear": 0.001 * self.num_steps}

    def stats(self) -> EngineStats:
        return EngineStats(num_steps=self.num_steps, num_completion_tokens_total=2 * self.num_steps)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        self.order.append(request)
        assert request.max_tokens is not None
        for _ in range(-(-request.max_tokens // 2)):
            self.num_steps += 1
            yield TextDelta("x")
        yield Finish("length", 90, request.max_tokens)


def test_settings_are_read_as_the_types_of_their_fields() -> None:
    changed = spec_with(SPEC, ["dtype=bfloat16", "num_threads=2", "trust_remote_code=true"])
    assert (changed.dtype, changed.num_threads, changed.trust_remote_code) == ("bfloat16", 2, True)


@pytest.mark.parametrize("setting", ["nonsense=1", "num_threads=two", "trust_remote_code=1"])
def test_a_setting_that_means_nothing_is_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        spec_with(SPEC, [setting])


async def test_decode_goes_by_the_engines_own_count_of_steps_and_tokens() -> None:
    engine = CountingEngine()
    found = await decode(engine, 1, 10, 0)  # type: ignore[arg-type]
    assert found.rows == 1
    assert found.tokens_per_s == pytest.approx(2 * 1e3 / found.step_ms)
    assert engine.num_steps >= 5


async def test_no_two_prompts_of_a_measurement_share_a_beginning() -> None:
    engine = CountingEngine()
    found = await prefill(engine, 4, 90, 0)  # type: ignore[arg-type]
    assert found.num_tokens == 360
    prompts = [item.prompt for item in engine.order if isinstance(item.prompt, TokenPrompt)]
    assert len({prompt.ids[:4] for prompt in prompts}) == 4
    assert all(min(prompt.ids) >= 300 and max(prompt.ids) < 1000 for prompt in prompts)
