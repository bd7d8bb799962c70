"""What the model may do in its next turn, and what it is shown of a result. Above: `responses`, `routes`.

Decisions are pure; only `fitted` asks, by its `count`, how long a conversation is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from hostler.errors import ContextLengthExceeded, HostlerError
from hostler.inference.v1 import inference_pb2 as pb

from gateway.mcp.calls import Outcome
from gateway.mcp.remote import cut
from gateway.responses.truncation import reserve_tokens, surely_fits

Count = Callable[[pb.Chat], Awaitable[tuple[int, int]]]
"""From a chat to its tokens and the tokens of the model's context."""
_LEAST_CHARS = 256


def next_choice(choice: pb.ToolChoice, *, named_one: bool, own_names: Sequence[str], may_call: bool) -> pb.ToolChoice:
    """Return how tools may be used after a turn that called some: a demand has been met, and holds no longer.

    Args:
        choice: of the turn before.
        named_one: the request demanded one certain tool.
        own_names: tools that the client itself runs.
        may_call: whether tools of MCP servers may still be called.
    """
    later = pb.ToolChoice(mode=choice.mode, allowed_names=choice.allowed_names)
    if choice.HasField("parallel"):
        later.parallel = choice.parallel
    if choice.mode in (pb.TOOL_CHOICE_MODE_REQUIRED, pb.TOOL_CHOICE_MODE_UNSPECIFIED):
        later.mode = pb.TOOL_CHOICE_MODE_AUTO
    if named_one:
        del later.allowed_names[:]
        later.ClearField("parallel")
    if not may_call:
        allowed = [name for name in own_names if not later.allowed_names or name in later.allowed_names]
        del later.allowed_names[:]
        later.allowed_names.extend(allowed)
        if not allowed:
            later.mode = pb.TOOL_CHOICE_MODE_NONE
    return later


async def fitted(
    outcome: Outcome, with_result: Callable[[Outcome], pb.Chat], max_tokens: int | None, context: int, count: Count
) -> Outcome:
    """Return an outcome whose text the model's context has room for, cut at its end if need be.

    Args:
        with_result: makes the next prompt of an outcome.
        max_tokens: of the reply, as asked for.
        context: tokens of the model's context; 0 if unknown.
    """
    text = outcome.text
    while True:
        chat = with_result(outcome)
        if len(outcome.text) <= _LEAST_CHARS or surely_fits(chat, max_tokens, context):
            return outcome
        try:
            num_tokens, limit = await count(chat)
            if num_tokens + reserve_tokens(max_tokens, limit) <= limit:
                return outcome
        except ContextLengthExceeded:
            pass
        except HostlerError:
            return outcome  # whatever is wrong, the next turn says it
        outcome = replace(outcome, text=cut(text, len(outcome.text) // 2))
