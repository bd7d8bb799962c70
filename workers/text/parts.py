"""Which form of a message's content a chat template takes: text, or a list of parts. Above: `prompts`, `system_turns`.

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
    """Return the roles whose text must be written as `[{"type": "text", "text": …}]`, because text alone is lost."""
    taken: set[str] = set()
    for role, before, after in (("user", [], []), ("assistant", ["user"], ["user"]), ("system", [], ["user"])):
        others = [[in_parts(plain(r), frozenset(taken)) for r in roles] for roles in (before, after)]
        as_text = [*others[0], plain(role), *others[1]]
        parted = [*others[0], in_parts(plain(role), frozenset((role,))), *others[1]]
        if not prints_all(render, as_text) and prints_all(render, parted):
            taken.add(role)
    return frozenset(taken)


def in_parts(message: Message, roles: frozenset[str]) -> Message:
    """Return the message with its text as one part, if its role is one of `roles` and it has any."""
    content = message.get("content")
    if message.get("role") not in roles or not isinstance(content, str) or not content:
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def plain(role: str) -> Message:
    """Return a message that `prints_all` looks for."""
    return {"role": role, "content": _MARK}


def prints_all(render: Render, messages: Sequence[Message]) -> bool:
    """Return whether every text of plain messages comes out, and not as the Python list that holds it."""
    try:
        rendered = render(messages)
    except Exception:  # templates may fail in any way on what they do not expect
        return False
    return rendered.count(_MARK) == len(messages) and "'text'" not in rendered and '"text"' not in rendered
