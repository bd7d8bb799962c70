"""Making a conversation fit a model's context by leaving out its oldest turns (`truncation: auto`). Above: `answer`.

What opens a conversation as its instructions stays. It is cut only before a user's message: many templates demand one
first, and no call loses its result. The newest turn always stays; if even that is too long, the worker says so.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from hostler.errors import ContextLengthExceeded
from hostler.inference.v1 import inference_pb2 as pb

Count = Callable[[pb.Chat], Awaitable[tuple[int, int]]]
"""From a chat to its tokens and the tokens of the model's context."""

_INSTRUCTING = (pb.ROLE_SYSTEM, pb.ROLE_DEVELOPER)
_LEAST_RESERVE_TOKENS = 16
_USUAL_RESERVE_TOKENS = 1024
# What a template writes around a message or a tool, generously.
_TEMPLATE_TOKENS = 64


def cut_points(messages: list[pb.Message]) -> tuple[int, list[int]]:
    """Return how many messages open the conversation, and where the rest may begin: nothing left out comes first."""
    opening = 0
    while opening < len(messages) and messages[opening].role in _INSTRUCTING:
        opening += 1
    later = [i for i in range(opening + 1, len(messages)) if messages[i].role == pb.ROLE_USER]
    return opening, [opening, *later]


def reserve_tokens(max_tokens: int | None, max_context_tokens: int) -> int:
    """Return the room to leave for the reply: what was asked for, but never more than half of the context."""
    wanted = min(_USUAL_RESERVE_TOKENS, max_context_tokens // 8) if max_tokens is None else max_tokens
    return max(_LEAST_RESERVE_TOKENS, min(wanted, max_context_tokens // 2))


def surely_fits(chat: pb.Chat, max_tokens: int | None, max_context_tokens: int) -> bool:
    """Return whether a conversation is so short that nobody need count: no token is shorter than a byte.

    Args:
        max_context_tokens: 0 if unknown.
    """
    if any(part.WhichOneof("part") != "text" for message in chat.messages for part in message.parts):
        return False
    num_bytes = chat.ByteSize() + _TEMPLATE_TOKENS * (len(chat.messages) + len(chat.tools) + 1)
    return num_bytes + reserve_tokens(max_tokens, max_context_tokens) <= max_context_tokens


async def fit(chat: pb.Chat, max_tokens: int | None, count: Count) -> None:
    """Leave out as few of the oldest turns as needed. Mutates `chat.messages`.

    Args:
        max_tokens: the reply's, as asked for.
        count: asked a logarithmic number of times.

    Raises:
        HostlerError: as `count` says, other than that a conversation is too long.
    """
    messages = list(chat.messages)
    opening, points = cut_points(messages)

    def cut(point: int) -> pb.Chat:
        shorter = pb.Chat()
        shorter.CopyFrom(chat)
        del shorter.messages[:]
        shorter.messages.extend([*messages[:opening], *messages[point:]])
        return shorter

    async def fits(point: int) -> bool:
        try:
            num_tokens, max_context_tokens = await count(cut(point))
        except ContextLengthExceeded:
            return False
        return num_tokens + reserve_tokens(max_tokens, max_context_tokens) <= max_context_tokens

    if len(points) == 1 or await fits(points[0]):
        return
    # The first place that fits; the last one is taken unasked.
    low, high = 1, len(points) - 1
    while low < high:
        middle = (low + high) // 2
        if await fits(points[middle]):
            high = middle
        else:
            low = middle + 1
    kept = cut(points[low])
    del chat.messages[:]
    chat.messages.extend(kept.messages)
