"""A chat completion whose model may call MCP servers' tools: several turns, seen by the client as one reply.

Above: `routes.chat`; below: `calls`, `turns`. In and out are the worker's events, so streams and whole replies of every
chat dialect stay as they are: calls of the servers' tools are made here and not shown, the client's own go to it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hostler.errors import UnsupportedParameter
from hostler.inference.v1 import inference_pb2 as pb

from gateway.dispatch import Event, Loading
from gateway.fields import dump_json
from gateway.mcp.calls import MAX_TURNS, Call, Outcome, listed, make_all
from gateway.mcp.remote import McpFault, RemoteTool
from gateway.mcp.turns import Count, fitted, next_choice

if TYPE_CHECKING:
    from gateway.mcp.connection import Connection

log = logging.getLogger(__name__)

Generate = Callable[[pb.GenerateRequest], AsyncGenerator[Event, None]]
_CUT_SHORT = (pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_CONTENT_FILTER)


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The servers' tools of one request, by the names that the model knows them under.

    Attributes:
        is_asked_for: the request names the servers; otherwise the configuration gives them to everybody.
    """

    tools: dict[str, tuple[Connection, RemoteTool]]
    is_asked_for: bool

    def put_into(self, chat: pb.Chat) -> None:
        """Offer the tools to the model beside the client's own."""
        for name, (_, tool) in self.tools.items():
            schema = dump_json(tool.input_schema, "tools")
            chat.tools.append(pb.Tool(name=name, description=tool.description, parameters_json=schema))


async def open_toolbox(
    connections: Sequence[tuple[str, Connection]], own: Sequence[str], *, is_asked_for: bool
) -> Toolbox:
    """Ask the servers what they offer. One that does not answer is left out, and the log says so.

    Args:
        own: names of the client's tools, which stay as they are.
    """

    async def ask(name: str, connection: Connection) -> list[tuple[str, Connection, RemoteTool]]:
        try:
            return [(name, connection, tool) for tool in (await listed(connection)).tools]
        except McpFault as fault:
            log.warning("MCP server left out of a chat", extra={"server": name, "kind": fault.kind})
            return []

    answers = await asyncio.gather(*(ask(name, connection) for name, connection in connections))
    offered = [each for answer in answers for each in answer]
    shared = Counter([*own, *(tool.name for _, _, tool in offered)])
    tools: dict[str, tuple[Connection, RemoteTool]] = {}
    for server, connection, tool in offered:
        name = tool.name if shared[tool.name] == 1 else f"{server}__{tool.name}"
        if name not in own:
            tools.setdefault(name, (connection, tool))
    return Toolbox(tools, is_asked_for)


@dataclass(slots=True)
class _Turn:
    """What the model did in one turn."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    # Of the servers' tools: index → (name, arguments).
    calls: dict[int, tuple[str, list[str]]] = field(default_factory=dict)
    own_calls: dict[int, int] = field(default_factory=dict)

    def message(self) -> pb.Message:
        message = pb.Message(role=pb.ROLE_ASSISTANT, reasoning="".join(self.reasoning))
        if text := "".join(self.text):
            message.parts.append(pb.Part(text=text))
        for index, (name, arguments) in self.calls.items():
            message.tool_calls.append(pb.ToolCall(id=f"call_{index}", name=name, arguments_json="".join(arguments)))
        return message


async def chat_turns(
    request: pb.GenerateRequest,
    toolbox: Toolbox,
    generate: Generate,
    count: Count,
    *,
    context: int,
) -> AsyncGenerator[Event, None]:
    """Yield the events of one choice, as if it were one generation; the last one is its finish, with all turns' usage.

    Args:
        request: of this choice; mutated.
        generate: has the model take a turn.
        count: counts a chat's tokens.
        context: tokens of the model's context; 0 if unknown.
    """
    chat = request.chat
    own_names = [tool.name for tool in chat.tools]
    named_one = chat.tool_choice.mode == pb.TOOL_CHOICE_MODE_REQUIRED and len(chat.tool_choice.allowed_names) == 1
    max_tokens = request.max_tokens if request.HasField("max_tokens") else None
    toolbox.put_into(chat)
    usage = pb.Usage()
    said_before = False
    for number in range(1, MAX_TURNS + 1):
        turn, finish = _Turn(), pb.Finish()
        async with aclosing(_one_turn(request, toolbox, generate, turn, said_before, may_drop=number == 1)) as events:
            async for event in events:
                if not isinstance(event, Loading) and event.WhichOneof("event") == "finish":
                    finish = event.finish
                else:
                    yield event
        for each in ("num_prompt_tokens", "num_cached_tokens", "num_completion_tokens", "num_reasoning_tokens"):
            setattr(usage, each, getattr(usage, each) + getattr(finish.usage, each))
        left = None if max_tokens is None else max_tokens - usage.num_completion_tokens
        is_cut = finish.reason in _CUT_SHORT
        if not turn.calls or turn.own_calls or is_cut or (left is not None and left < 1):
            # What the client must answer goes first: it would not see a result that came beside its own calls.
            if turn.calls and not turn.own_calls and not is_cut:
                finish.reason = pb.FINISH_REASON_LENGTH
            finish.usage.CopyFrom(usage)
            yield pb.GenerateResponse(finish=finish)
            return
        chat.messages.append(turn.message())
        parallel = not chat.tool_choice.HasField("parallel") or chat.tool_choice.parallel
        await _answer(chat, turn, toolbox, max_tokens, context, count, together=parallel)
        choice = next_choice(
            chat.tool_choice, named_one=named_one, own_names=own_names, may_call=number < MAX_TURNS - 1
        )
        chat.tool_choice.CopyFrom(choice)
        chat.continue_final_message, named_one = False, False
        said_before = said_before or bool(turn.text)
        if left is not None:
            request.max_tokens = left
    raise AssertionError("the last turn has no tools to call")


async def _one_turn(
    request: pb.GenerateRequest, toolbox: Toolbox, generate: Generate, turn: _Turn, said_before: bool, *, may_drop: bool
) -> AsyncGenerator[Event, None]:
    """Have the model generate once; note down what it did, and pass on what the client may see."""
    try:
        async with aclosing(generate(request)) as events:
            async for event in events:
                if isinstance(event, Loading) or not _is_hidden(event, toolbox, turn):
                    if said_before and not isinstance(event, Loading) and event.WhichOneof("event") == "text":
                        said_before = False
                        yield pb.GenerateResponse(text=pb.TextDelta(text="\n\n"))
                    yield event
        return
    except UnsupportedParameter as error:
        # A model without tools: what was not asked for must not cost the answer.
        own = [tool for tool in request.chat.tools if tool.name not in toolbox.tools]
        if error.param != "tools" or not may_drop or toolbox.is_asked_for or own:
            raise
        del request.chat.tools[:]
    async with aclosing(generate(request)) as events:
        async for event in events:
            yield event


def _is_hidden(event: pb.GenerateResponse, toolbox: Toolbox, turn: _Turn) -> bool:
    """Note down an event; return whether the client must not see it. Its own calls are numbered without the others."""
    kind = event.WhichOneof("event")
    if kind == "text":
        turn.text.append(event.text.text)
    elif kind == "reasoning":
        turn.reasoning.append(event.reasoning.text)
    elif kind == "tool_call_start":
        start = event.tool_call_start
        if start.name in toolbox.tools:
            turn.calls[start.index] = (start.name, [])
            return True
        turn.own_calls[start.index] = len(turn.own_calls)
        start.index = turn.own_calls[start.index]
    elif kind == "tool_call_arguments":
        part = event.tool_call_arguments
        if part.index in turn.calls:
            turn.calls[part.index][1].append(part.json_fragment)
            return True
        part.index = turn.own_calls.get(part.index, part.index)
    elif kind == "tool_call_end":
        if event.tool_call_end.index in turn.calls:
            return True
        event.tool_call_end.index = turn.own_calls.get(event.tool_call_end.index, event.tool_call_end.index)
    return False


async def _answer(
    chat: pb.Chat, turn: _Turn, toolbox: Toolbox, max_tokens: int | None, context: int, count: Count, *, together: bool
) -> None:
    """Make a turn's calls, and add their results to the conversation."""
    calls = [Call(*toolbox.tools[name], "".join(arguments)) for name, arguments in turn.calls.values()]
    waiting = list(turn.calls.items())
    async with aclosing(make_all(calls, together=together)) as outcomes:
        async for outcome in outcomes:
            index, (name, _) = waiting.pop(0)

            def result(outcome: Outcome, identity: str = f"call_{index}", name: str = name) -> pb.Message:
                part = pb.Part(text=outcome.for_model)
                return pb.Message(role=pb.ROLE_TOOL, parts=[part], tool_call_id=identity, name=name)

            def with_result(outcome: Outcome, result: Callable[[Outcome], pb.Message] = result) -> pb.Chat:
                longer = pb.Chat()
                longer.CopyFrom(chat)
                longer.messages.append(result(outcome))
                return longer

            chat.messages.append(result(await fitted(outcome, with_result, max_tokens, context, count)))
