"""Replies that must follow a schema, a grammar or a tool, held against independent validators at a hot temperature.

The tiny model's weights are random, so at temperature 1.5 it tries everything that a grammar lets through. How many
replies are tried: HOSTLER_TEST_REPLIES (default 24 with the tiny model, half as many with the real one).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hostler.errors import HostlerError, InvalidRequest
from jsonschema import Draft202012Validator

from tests.workers.schemas import random_schema
from workers.engine import (
    ChatPrompt,
    Constraint,
    Finish,
    GenerationRequest,
    ReasoningDelta,
    ReasoningRule,
    SamplingParams,
    TextDelta,
    TextPrompt,
    ToolCallArguments,
    ToolCallStart,
    ToolSpec,
    ToolUse,
)

REPLIES = int(os.environ.get("HOSTLER_TEST_REPLIES", "24"))
PROMPT = TextPrompt("An example: ")


@pytest.fixture
def runner_name() -> str:
    """What a reply must be does not depend on who runs the model: one runner is enough."""
    return "eager"


@dataclass
class Got:
    """A whole reply."""

    text: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def reason(self) -> str:
        assert self.finish is not None
        return self.finish.reason


async def ask(engine: Any, **fields: Any) -> Got:
    got = Got()
    async for event in engine.generate(GenerationRequest(**fields)):
        if isinstance(event, TextDelta):
            got.text += event.text
        elif isinstance(event, ReasoningDelta):
            got.reasoning += event.text
        elif isinstance(event, ToolCallStart):
            assert event.index == len(got.calls)
            got.calls.append([event.name, "", event.id])
        elif isinstance(event, ToolCallArguments):
            got.calls[event.index][1] += event.json_fragment
        elif isinstance(event, Finish):
            got.finish = event
    return got


def hot(seed: int) -> SamplingParams:
    return SamplingParams(temperature=1.5, seed=seed)


async def invalid_replies(engine: Any, prompt: Any, seeds: Sequence[int], at_once: int) -> list[str]:
    """Ask once for each seed's schema; return what is wrong with replies, one line each."""
    gate = asyncio.Semaphore(at_once)

    async def one(seed: int) -> str | None:
        schema = random_schema(seed)
        constraint = Constraint("json_schema", json.dumps(schema))
        async with gate:
            got = await ask(engine, prompt=prompt, sampling=hot(seed), constraint=constraint, max_tokens=400)
        try:
            Draft202012Validator(schema).validate(json.loads(got.text))
        except Exception as error:
            return f"{seed}: {got.reason}: {type(error).__name__}: {got.text[:300]!r}"
        return None if got.reason == "stop" else f"{seed}: {got.reason}"

    return [line for line in await asyncio.gather(*map(one, seeds)) if line]


WEATHER = ToolSpec(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 12},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "unit": {"enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city", "unit"],
    },
)
TIME = ToolSpec("get_time", {"type": "object", "properties": {"zone": {"type": "string", "maxLength": 8}}})


def weather_chat(*tools: ToolSpec) -> ChatPrompt:
    shown = [
        {"type": "function", "function": {"name": t.name, "description": "Looks it up.", "parameters": t.parameters}}
        for t in tools
    ]
    return ChatPrompt([{"role": "user", "content": "What is the weather in Paris?"}], shown)


async def invalid_calls(engine: Any, seeds: Sequence[int], at_once: int) -> list[str]:
    """Demand a call of one named tool for each seed; return what is wrong, one line each."""
    gate = asyncio.Semaphore(at_once)
    use = ToolUse((WEATHER,), required=True, parallel=False)

    async def one(seed: int) -> str | None:
        async with gate:
            got = await ask(
                engine, prompt=weather_chat(WEATHER, TIME), sampling=hot(seed), tool_use=use, max_tokens=300
            )
        try:
            assert got.reason == "tool_calls"
            assert got.text == ""
            ((name, arguments, call_id),) = got.calls
            assert name == "get_weather"
            assert re.fullmatch(r"call_[0-9a-f]{24}", call_id)
            Draft202012Validator(WEATHER.parameters).validate(json.loads(arguments))
        except Exception as error:
            return f"{seed}: {got.reason}: {type(error).__name__} {error}: {got.calls} {got.text[:200]!r}"
        return None

    return [line for line in await asyncio.gather(*map(one, seeds)) if line]


async def test_every_reply_under_a_random_schema_is_valid(tiny_model: Path, open_engine: Callable[..., Any]) -> None:
    async with open_engine(tiny_model, max_running=16) as engine:
        assert await invalid_replies(engine, PROMPT, range(REPLIES), 16) == []


async def test_every_demanded_call_of_a_named_tool_is_valid(tiny_model: Path, open_engine: Callable[..., Any]) -> None:
    async with open_engine(tiny_model, max_running=16) as engine:
        assert engine.facts.supports_tools
        assert await invalid_calls(engine, range(REPLIES), 16) == []


@pytest.mark.real_model
@pytest.mark.timeout(900)
async def test_the_real_model_keeps_random_schemas_and_named_tools(
    qwen_coder: Path, open_engine: Callable[..., Any]
) -> None:
    chat = ChatPrompt([{"role": "user", "content": "Fill in the form with something sensible, as JSON."}])
    async with open_engine(qwen_coder, max_running=16, kv_cache_bytes=2**28, dtype="auto") as engine:
        assert await invalid_replies(engine, chat, range(REPLIES // 2), 16) == []
        assert await invalid_calls(engine, range(REPLIES // 4), 16) == []


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        (Constraint("regex", r"[a-c]{3}-\d{2}"), r"[a-c]{3}-\d{2}"),
        (Constraint("lark", 'start: "yes" | "no" " " WORD\nWORD: /[a-z]{1,5}/\n'), r"yes|no [a-z]{1,5}"),
    ],
    ids=["regex", "lark"],
)
async def test_regexes_and_grammars_are_followed(
    tiny_model: Path, open_engine: Callable[..., Any], constraint: Constraint, pattern: str
) -> None:
    async with open_engine(tiny_model) as engine:
        for seed in range(8):
            got = await ask(engine, prompt=PROMPT, sampling=hot(seed), constraint=constraint, max_tokens=60)
            assert re.fullmatch(pattern, got.text), got.text
            assert got.reason == "stop"


async def test_json_mode_gives_an_object(tiny_model: Path, open_engine: Callable[..., Any]) -> None:
    async with open_engine(tiny_model) as engine:
        got = await ask(engine, prompt=PROMPT, sampling=hot(3), constraint=Constraint("json_object"), max_tokens=600)
    if got.reason == "stop":
        assert isinstance(json.loads(got.text), dict)
    else:
        assert got.text.startswith("{")


async def test_a_constraint_holds_for_greedy_replies_penalties_and_bias(
    tiny_model: Path, open_engine: Callable[..., Any]
) -> None:
    sampling = SamplingParams(temperature=0, repetition_penalty=1.5, logit_bias={5: 100.0}, frequency_penalty=1.0)
    constraint = Constraint("regex", "[0-9]{4,8}")
    async with open_engine(tiny_model) as engine:
        got = await ask(engine, prompt=PROMPT, sampling=sampling, constraint=constraint, max_tokens=60)
    assert re.fullmatch("[0-9]{4,8}", got.text)


async def test_logprobs_stay_those_of_the_model_itself(tiny_model: Path, open_engine: Callable[..., Any]) -> None:
    async with open_engine(tiny_model) as engine:
        request = GenerationRequest(
            PROMPT, sampling=hot(1), constraint=Constraint("regex", "ab"), max_tokens=9, top_logprobs=1
        )
        scored = [s async for e in engine.generate(request) if isinstance(e, TextDelta) for s in e.logprobs]
    assert "".join(s.token.decode() for s in scored) == "ab"
    assert all(s.logprob < -0.5 for s in scored), "a mask would have left the forced token all of the probability"


async def test_a_free_reply_beside_a_constrained_one_is_what_it_is_alone(
    tiny_model: Path, open_engine: Callable[..., Any]
) -> None:
    free = {"prompt": PROMPT, "sampling": hot(9), "max_tokens": 20}
    async with open_engine(tiny_model) as engine:
        alone = await ask(engine, **free)
        bound = {"prompt": PROMPT, "sampling": hot(2), "max_tokens": 40, "constraint": Constraint("regex", "x{20}")}
        together, other = await asyncio.gather(ask(engine, **free), ask(engine, **bound))
    assert together.text == alone.text
    assert other.text == "x" * 20


async def test_several_calls_are_made_where_parallel_ones_are_allowed(
    tiny_model: Path, open_engine: Callable[..., Any]
) -> None:
    use = ToolUse((WEATHER, TIME), required=True)
    counts = set()
    async with open_engine(tiny_model, max_running=8) as engine:
        prompt = weather_chat(WEATHER, TIME)
        wanted = [ask(engine, prompt=prompt, sampling=hot(s), tool_use=use, max_tokens=1500) for s in range(8)]
        for got in await asyncio.gather(*wanted):
            counts.add(len(got.calls))
            for name, arguments, _ in got.calls if got.reason == "tool_calls" else got.calls[:-1]:
                Draft202012Validator({"get_weather": WEATHER, "get_time": TIME}[name].parameters).validate(
                    json.loads(arguments)
                )
    assert max(counts) > 1


async def test_a_strict_tool_is_right_once_its_call_begins_and_text_before_it_is_free(
    tiny_model: Path, open_engine: Callable[..., Any]
) -> None:
    strict = ToolSpec(WEATHER.name, {**WEATHER.parameters, "additionalProperties": False}, strict=True)
    async with open_engine(tiny_model) as engine:
        marker = engine._loaded.tokenizer.convert_tokens_to_ids("<tool_call>")
        called = 0
        for seed in range(6):
            got = await ask(
                engine,
                prompt=weather_chat(strict),
                # The bias makes a random model begin a call at some point.
                sampling=SamplingParams(temperature=1.5, seed=seed, logit_bias={marker: 7.0}),
                tool_use=ToolUse((strict,)),
                max_tokens=300,
            )
            for name, arguments, _ in got.calls[:1]:
                called += 1
                assert name == "get_weather"
                Draft202012Validator(strict.parameters).validate(json.loads(arguments))
    assert called > 2


BOMBS: list[tuple[str, dict[str, Any] | str]] = [
    ("json_schema", {"allOf": [{"anyOf": [{"properties": {f"k{i}{j}": {}}} for j in range(8)]} for i in range(8)]}),
    ("json_schema", {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}}),
    ("json_schema", {"$ref": "https://example.com/schema.json"}),
    ("json_schema", {"type": "array", "uniqueItems": True}),
    ("json_schema", {"type": "string", "pattern": "(?=x)y"}),
    ("json_schema", '{"a":' * 5000 + "1" + "}" * 5000),
    ("json_schema", "no json"),
    ("json_schema", "[]"),
    ("regex", "(?<=a)b"),
    ("regex", "("),
    ("regex", ""),
    ("lark", "start: missing"),
    ("lark", 'start: "a" @other'),
]


@pytest.mark.parametrize(("kind", "bomb"), BOMBS, ids=[f"{k}-{i}" for i, (k, _) in enumerate(BOMBS)])
async def test_a_schema_or_grammar_that_cannot_be_followed_is_refused_by_name_and_soon(
    tiny_model: Path, open_engine: Callable[..., Any], kind: str, bomb: dict[str, Any] | str
) -> None:
    text = bomb if isinstance(bomb, str) else json.dumps(bomb)
    async with open_engine(tiny_model) as engine:
        began = time.monotonic()
        with pytest.raises(InvalidRequest) as refused:
            await ask(engine, prompt=PROMPT, constraint=Constraint(kind, text), max_tokens=5)
        assert time.monotonic() - began < 20
        assert refused.value.param == ("response_format" if kind == "json_schema" else "structured_outputs")
        got = await ask(engine, prompt=PROMPT, sampling=hot(1), max_tokens=3)
    assert got.finish is not None


@pytest.mark.parametrize(
    "regex", ["(x+x+)+y{1,1000}[a-z]{1,5000}", "((a{1,1000}){1,1000}){1,1000}", "(a|b|ab)*c(a?){1000}a{1000}"]
)
async def test_a_hostile_regex_costs_only_its_own_request(
    tiny_model: Path, open_engine: Callable[..., Any], regex: str
) -> None:
    async with open_engine(tiny_model) as engine:
        hostile = ask(engine, prompt=PROMPT, sampling=hot(1), constraint=Constraint("regex", regex), max_tokens=20)
        friendly = ask(
            engine, prompt=PROMPT, sampling=hot(2), constraint=Constraint("regex", "[a-z]{9}"), max_tokens=20
        )
        outcome, fine = await asyncio.gather(hostile, friendly, return_exceptions=True)
    assert isinstance(outcome, Got | HostlerError)
    assert isinstance(fine, Got)
    assert re.fullmatch("[a-z]{9}", fine.text)


async def test_compiled_grammars_are_kept_within_bounds(tiny_model: Path, open_engine: Callable[..., Any]) -> None:
    async with open_engine(tiny_model) as engine:
        compiler = engine._replies._compiler
        for count in range(70):
            await compiler.guide(f"start: /a{{{count + 1}}}/\n", "structured_outputs")
        assert len(compiler._cache) == 64
        big = "start: /" + "a" * 300_000 + "/\n"
        for count in range(40):
            await compiler.guide(big.replace("a/", "a" * (count + 1) + "/"), "structured_outputs")
        assert compiler._cached_bytes <= 8 * 2**20


async def test_a_budget_of_reasoning_ends_the_thoughts_and_the_answer_is_still_structured(
    tiny_thinker: Path, open_engine: Callable[..., Any]
) -> None:
    chat = ChatPrompt([{"role": "user", "content": "Think."}])
    async with open_engine(tiny_thinker) as engine:
        assert engine.facts.supports_reasoning
        for seed in range(8):
            got = await ask(
                engine,
                prompt=chat,
                sampling=hot(seed),
                constraint=Constraint("regex", "[0-9]{3}"),
                reasoning=ReasoningRule(budget_tokens=10),
                max_tokens=60,
            )
            assert re.fullmatch("[0-9]{3}", got.text)
            assert got.finish is not None
            # The budget, the end of a character, the mark.
            assert 1 <= got.finish.num_reasoning_tokens <= 15
            assert got.reason == "stop"


async def test_reasoning_that_is_off_is_closed_at_once(tiny_thinker: Path, open_engine: Callable[..., Any]) -> None:
    chat = ChatPrompt([{"role": "user", "content": "Think."}])
    async with open_engine(tiny_thinker) as engine:
        got = await ask(engine, prompt=chat, sampling=hot(5), reasoning=ReasoningRule(enabled=False), max_tokens=12)
    assert got.reasoning == ""
    assert got.finish is not None
    assert got.finish.num_reasoning_tokens == 1
