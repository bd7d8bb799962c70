"""Which form of a message's content a chat template takes: text, or a list of parts. Above: `prompts.py`.

Templates of image-text models differ: some read only lists of parts and print nothing of a plain text, some read
both, some read lists of user messages only. Asking the template itself is the one way to know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Message = Mapping[str, object]
Render = Callable[[Sequence[Message]], str]
"""Renders messages; raises whatever a template may raise."""

_MARK = "hostlerprobe"


def roles_in_parts(render: Render) -> frozenset[str]:
    """Return the roles whose text should be written as `[{"type": "text", "text": …}]`.

    That is the form which the processors' own examples use, so it comes first wherever the template prints it.
    """
    user = _part("user", 0)
    taken = set()
    if _prints(render, [user], 1):
        taken.add("user")
    opening: Message = user if taken else {"role": "user", "content": f"{_MARK}0"}
    if _prints(render, [opening, _part("assistant", 1), {**opening}], 3):
        taken.add("assistant")
    if _prints(render, [_part("system", 1), opening], 2):
        taken.add("system")
    return frozenset(taken)


def in_parts(message: Message, roles: frozenset[str]) -> Message:
    """Return the message with its text as one part, if its role is one of `roles` and it has any."""
    content = message.get("content")
    if message.get("role") not in roles or not isinstance(content, str) or not content:
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def _part(role: str, number: int) -> Message:
    return {"role": role, "content": [{"type": "text", "text": f"{_MARK}{number}"}]}


def _prints(render: Render, messages: Sequence[Message], times: int) -> bool:
    """Whether the texts come out, and not as the Python list that holds them."""
    try:
        rendered = render(messages)
    except Exception:  # templates may fail in any way on what they do not expect
        return False
    return rendered.count(_MARK) == times and "'text'" not in rendered and '"text"' not in rendered
