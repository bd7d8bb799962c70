"""Where a chat template takes the system's messages, and what becomes of the others. Above: `prompts.py`.

Clients let the system speak in the middle of a conversation; many templates raise an error then, some drop the text,
a few know no system at all. What a template does not take is said by the user: it comes out in its place, and whatever
was cached of the conversation before it stays of use. Asking the template itself is the one way to know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from workers.text.parts import Message, Render, in_parts, plain, prints_all


@dataclass(frozen=True, slots=True)
class SystemTurns:
    """Which messages of the system a template prints.

    Attributes:
        opening: the first message of a conversation.
        later: any other.
    """

    opening: bool = True
    later: bool = True


def system_turns(render: Render, roles_in_parts: frozenset[str]) -> SystemTurns:
    """Return where a template takes the system's messages.

    Args:
        render: the template.
        roles_in_parts: the roles whose text it takes as lists of parts.
    """

    def takes(*roles: str) -> bool:
        return prints_all(render, [in_parts(plain(role), roles_in_parts) for role in roles])

    if not takes("user", "assistant", "user"):
        return SystemTurns()  # an odd one: no answer of its would mean anything
    opening = takes("system", "user")
    first = ("system",) if opening else ()
    turns = (*first, "user", "assistant")
    later = takes(*turns, "user", "system") and takes(*turns, "system", "user") and takes(*first, "user", "system")
    return SystemTurns(opening, later)


def said_by_user(messages: Sequence[Message], takes: SystemTurns) -> list[Message]:
    """Return the messages with what the template does not take of the system's in the user's turns.

    It joins the user's message beside it, because templates that want roles in turn are those that refuse it.
    """
    if takes.opening and takes.later:
        return list(messages)
    out: list[Message] = []
    is_ours = False  # whether the last message holds what the system said
    for index, message in enumerate(messages):
        said = message.get("role") == "system" and not (takes.opening if index == 0 else takes.later)
        turned = {**message, "role": "user"} if said else message
        beside = bool(out) and out[-1].get("role") == "user" and turned.get("role") == "user"
        if beside and (said or is_ours):
            out[-1] = {**out[-1], "content": _joined(out[-1].get("content"), turned.get("content"))}
            is_ours = is_ours or said
        else:
            out.append(turned)
            is_ours = said
    return out


def _joined(before: object, after: object) -> object:
    if isinstance(before, str) and isinstance(after, str):
        return f"{before}\n\n{after}" if before and after else before or after
    return [*_parts(before), *_parts("\n\n"), *_parts(after)]


def _parts(content: object) -> list[Mapping[str, object]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return list(content) if isinstance(content, list) else []
