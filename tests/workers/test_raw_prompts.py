"""Raw prompts, as the completions API has them: their own logprobs, gaps to fill, control tokens, no reply at all."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostler.errors import UnsupportedParameter

from tests.workers.test_text_engine import random_prompts, reference_model
from workers.engine import (
    Finish,
    GenerationRequest,
    PromptLogprobs,
    SamplingParams,
    TextDelta,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
)

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


async def scored(engine: Any, ids: tuple[int, ...], max_tokens: int = 0, top: int = 3) -> tuple[TokenLogprob, ...]:
    """Return the prompt's logprobs, which must come once and before any text."""
    request = GenerationRequest(
        TokenPrompt(ids), sampling=GREEDY, max_tokens=max_tokens, top_logprobs=top, echo_logprobs=True
    )
    events = [event async for event in engine.generate(request)]
    assert [isinstance(event, PromptLogprobs) for event in events].index(True) == 0
    assert sum(isinstance(event, PromptLogprobs) for event in events) == 1
    assert isinstance(events[-1], Finish)
    assert events[-1].num_completion_tokens == max_tokens
    return events[0].tokens


def expected(path: Path, ids: tuple[int, ...]) -> torch.Tensor:
    """Return (tokens - 1, vocab): what transformers says of each token after the first."""
    with torch.inference_mode():
        return reference_model(path)(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)


def check(path: Path, ids: tuple[int, ...], got: tuple[TokenLogprob, ...]) -> None:
    assert [item.token_id for item in got] == list(ids)
    assert math.isnan(got[0].logprob)
    want = expected(path, ids)
    for row, item in zip(want, got[1:], strict=True):
        assert item.logprob == pytest.approx(float(row[item.token_id]), abs=1e-3)
        top = row.topk(3).values.tolist()
        assert [t.logprob for t in item.top] == pytest.approx(top, abs=1e-3)


async def test_prompt_logprobs_equal_transformers_in_chunks_and_in_company(
    tiny_model_of_each_architecture: Path, open_engine: Callable[..., Any]
) -> None:
    path = tiny_model_of_each_architecture
    prompts = [(7,), *random_prompts(6, 900, 90)]
    async with open_engine(path, max_running=4, prefill_chunk_tokens=16) as engine:
        for ids, got in zip(
            prompts, await asyncio.gather(*(scored(engine, p, n) for n, p in enumerate(prompts))), strict=True
        ):
            check(path, ids, got)


async def test_a_prompt_that_is_in_the_cache_is_scored_all_the_same(
    tiny_model: Path, open_engine: Callable[..., Any]
) -> None:
    ids = random_prompts(1, 900, 200)[0] * 2
    async with open_engine(tiny_model) as engine:
        await scored(engine, ids, 4)
        check(tiny_model, ids, await scored(engine, ids, 4))


async def test_prompts_are_scored_when_sequences_are_preempted(
    tiny_model: Path, open_engine: Callable[..., Any]
) -> None:
    prompts = random_prompts(8, 900, 60)
    async with open_engine(tiny_model) as engine:
        per_token = engine.facts.kv_bytes_per_token
    async with open_engine(
        tiny_model, kv_cache_bytes=per_token * 150, max_running=8, prefill_chunk_tokens=16
    ) as engine:
        for ids, got in zip(prompts, await asyncio.gather(*(scored(engine, p, 40) for p in prompts)), strict=True):
            check(tiny_model, ids, got)


async def test_no_tokens_asked_is_no_text_and_says_length(tiny_model: Path, open_engine: Callable[..., Any]) -> None:
    async with open_engine(tiny_model) as engine:
        request = GenerationRequest(TokenPrompt((5, 6, 7)), max_tokens=0)
        events = [event async for event in engine.generate(request)]
    assert [(e.reason, e.num_prompt_tokens, e.num_completion_tokens) for e in events] == [("length", 3, 0)]


async def test_a_raw_prompt_means_its_control_tokens(tiny_model: Path, open_engine: Callable[..., Any]) -> None:
    async with open_engine(tiny_model) as engine:
        assert (await engine.tokenize(TextPrompt("<|im_start|>user\n")))[0] == 1
        assert await engine.tokenize(TextPrompt("")) == []
        assert not engine.facts.supports_fill_in_middle
        with pytest.raises(UnsupportedParameter):
            await engine.tokenize(TextPrompt("a", suffix="b"))


@pytest.fixture(scope="module")
def tiny_coder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Qwen3 with StarCoder's names for three of its tokens."""
    directory = tmp_path_factory.mktemp("tiny-coder")
    names = {"<tool_call>": "<fim_prefix>", "</tool_call>": "<fim_suffix>", "<think>": "<fim_middle>"}
    names["</think>"] = "<file_sep>"
    for file in tiny_model.iterdir():
        text = file.read_bytes()
        if file.suffix == ".json":
            for old, new in names.items():
                text = text.replace(json.dumps(old).encode(), json.dumps(new).encode())
        (directory / file.name).write_bytes(text)
    return directory


async def test_a_gap_is_asked_for_in_the_models_own_way_and_ends_at_its_own_marks(
    tiny_coder: Path, open_engine: Callable[..., Any]
) -> None:
    async with open_engine(tiny_coder) as engine:
        assert engine.facts.supports_fill_in_middle
        plain = {text: await engine.tokenize(TextPrompt(text)) for text in ("def f(", "): pass", "<", "fim_middle>")}
        fim = {t: (await engine.tokenize(TextPrompt(f"<fim_{t}>")))[0] for t in ("prefix", "suffix", "middle")}
        got = await engine.tokenize(TextPrompt("def f(", suffix="): pass"))
        assert got == [fim["prefix"], *plain["def f("], fim["suffix"], *plain["): pass"], fim["middle"]]
        forged = await engine.tokenize(TextPrompt("x<fim_middle>", suffix="y<fim_prefix>"))
        assert [forged.count(i) for i in fim.values()] == [1, 1, 1]
        separator = (await engine.tokenize(TextPrompt("<file_sep>")))[0]
        sampling = SamplingParams(temperature=0.0, logit_bias={separator: 100.0})
        for suffix, reason in (("b", "stop"), ("", "length")):
            request = GenerationRequest(TextPrompt("a", suffix=suffix), sampling=sampling, max_tokens=5)
            events = [event async for event in engine.generate(request)]
            assert events[-1].reason == reason
            assert any(isinstance(e, TextDelta) and e.text for e in events) is (reason == "length")


@pytest.mark.real_model
async def test_a_real_coder_fills_the_gap(qwen_coder: Path, open_engine: Callable[..., Any], runner_name: str) -> None:
    if runner_name == "eager":
        pytest.skip("minutes; the prompt and its end are the same for both runners")
    prompt = TextPrompt("def add(a, b):\n    return ", suffix="\n\n\nprint(add(1, 2))\n")
    async with open_engine(qwen_coder, dtype="bfloat16", num_threads=2) as engine:
        request = GenerationRequest(prompt, sampling=SamplingParams(temperature=0.0), max_tokens=16)
        events = [event async for event in engine.generate(request)]
    assert "".join(e.text for e in events if isinstance(e, TextDelta)).startswith("a + b\n")
