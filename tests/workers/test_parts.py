"""Templates of every form get every text, whether they read plain content or lists of parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from workers.text.parts import in_parts, roles_in_parts

PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
JOINED = "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + '\n' }}{% endfor %}"
EITHER = (
    "{% for m in messages %}[{{ m.role }}] {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
)
PARTS_ONLY = (
    "{% for m in messages %}[{{ m.role }}] {% for p in m.content %}{% if p['type'] == 'text' %}{{ p['text'] }}"
    "{% endif %}{% endfor %}\n{% endfor %}"
)
USER_PARTS_ONLY = (
    "{% for m in messages %}{% if m.role == 'user' %}[user] "
    "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}\n"
    "{% else %}{{ '[' + m.role + '] ' + m.content + '\n' }}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PARTS_ONLY


def renderer(template: str) -> Callable[[Sequence[Any]], str]:
    def refuse(message: str) -> None:
        raise ValueError(message)

    compiled = ImmutableSandboxedEnvironment().from_string(template)
    return lambda messages: compiled.render(messages=messages, raise_exception=refuse)


@pytest.mark.parametrize(
    ("template", "roles"),
    [
        (PLAIN, set()),
        (JOINED, set()),
        (EITHER, set()),
        (PARTS_ONLY, {"user", "assistant", "system"}),
        (USER_PARTS_ONLY, {"user"}),
        (NO_SYSTEM, {"user", "assistant"}),
        ("says nothing", set()),
    ],
)
def test_text_becomes_a_part_only_for_roles_whose_plain_text_is_lost(template: str, roles: set[str]) -> None:
    assert roles_in_parts(renderer(template)) == roles


@pytest.mark.parametrize("template", [PLAIN, JOINED, EITHER, PARTS_ONLY, USER_PARTS_ONLY])
def test_every_text_comes_out(template: str) -> None:
    render = renderer(template)
    roles = roles_in_parts(render)
    said = [("system", "be kind"), ("user", "one"), ("assistant", "two"), ("user", "three")]
    rendered = render([in_parts({"role": role, "content": text}, roles) for role, text in said])
    assert rendered.splitlines() == [f"[{role}] {text}" for role, text in said]


def test_empty_text_and_lists_stay_as_they_are() -> None:
    roles = frozenset(("user",))
    for content in ("", [{"type": "image"}], None):
        assert in_parts({"role": "user", "content": content}, roles)["content"] == content
