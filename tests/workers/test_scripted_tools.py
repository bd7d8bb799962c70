"""The scripted engine's tool calls: a function of the prompt, turn by turn."""

from __future__ import annotations

import pytest
from hostler.errors import UnsupportedParameter

from workers.engine import (
    ChatPrompt,
    Event,
    Finish,
    GenerationRequest,
    LoadSpec,
    TextDelta,
    ToolCallArguments,
    ToolCallStart,
    ToolSpec,
    ToolUse,
)
from workers.scripted import ScriptedEngine

ASK = {"role": "user", "content": 'Please [[call find {"name": "Ada"}]] and [[call price {"id": "$"}]].'}
TOOLS = ToolUse((ToolSpec("find"), ToolSpec("price")))


async def said(*answers: str, use: ToolUse = TOOLS) -> list[Event]:
    messages = [ASK, *({"role": "tool", "content": answer} for answer in answers)]
    engine = ScriptedEngine(LoadSpec(model="m", path=""))
    return [event async for event in engine.generate(GenerationRequest(ChatPrompt(messages), tool_use=use))]


def call(events: list[Event]) -> tuple[str, str]:
    (start,) = [event for event in events if isinstance(event, ToolCallStart)]
    return start.name, "".join(event.json_fragment for event in events if isinstance(event, ToolCallArguments))


async def test_it_calls_what_the_prompt_says_in_order_and_then_says_the_results() -> None:
    assert call(await said()) == ("find", '{"name": "Ada"}')
    assert call(await said('A-"17')) == ("price", r'{"id": "A-\"17"}')
    last = await said("A-17", "129")
    assert [event.text for event in last if isinstance(event, TextDelta)] == ["A-17 | 129"]
    assert isinstance(last[-1], Finish)
    assert last[-1].reason == "stop"


async def test_a_tool_that_may_not_be_called_is_not() -> None:
    events = await said(use=ToolUse((ToolSpec("price"),)))
    assert not any(isinstance(event, ToolCallStart) for event in events)
    with pytest.raises(UnsupportedParameter):
        await said("a", "b", use=ToolUse(TOOLS.tools, required=True))


async def test_a_reply_ends_where_the_context_does() -> None:
    engine = ScriptedEngine(LoadSpec(model="m", path=""))
    request = GenerationRequest(ChatPrompt([{"role": "user", "content": "word " * 32_700}]), max_tokens=10**9)
    *_, last = [event async for event in engine.generate(request)]
    assert isinstance(last, Finish)
    assert (last.reason, last.num_prompt_tokens + last.num_completion_tokens) == (
        "length",
        engine.facts.max_context_tokens,
    )
