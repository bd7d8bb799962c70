"""What the system says reaches the model wherever it stands, whatever the template takes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.workers.test_parts import EITHER, JOINED, NO_SYSTEM, PARTS_ONLY, PLAIN, USER_PARTS_ONLY, renderer
from workers.text.parts import in_parts, roles_in_parts
from workers.text.system_turns import SystemTurns, said_by_user, system_turns

RAISE = "{{ raise_exception('no') }}"
FIRST_ONLY = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}" + RAISE + "{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}"
)
DROPS_LATER = (
    "{% for m in messages %}{% if m.role != 'system' or loop.first %}[{{ m.role }}] {{ m.content }}\n{% endif %}"
    "{% endfor %}"
)
# As Mistral's and Gemma's: roles in turn, and an opening message of the system only where there is one.
IN_TURN = (
    "{% if messages[0].role == 'system' %}[system] {{ messages[0].content }}\n{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}" + RAISE + "{% endif %}[{{ m.role }}] {{ m.content }}\n"
    "{% endfor %}"
)
IN_TURN_WITHOUT_SYSTEM = "{% if messages[0].role == 'system' %}" + RAISE + "{% endif %}" + IN_TURN
TALK = [
    ("system", "be kind"),
    ("user", "one"),
    ("system", "early"),
    ("assistant", "two"),
    ("system", "between"),
    ("user", "three"),
    ("system", "late"),
]


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PLAIN, SystemTurns(True, True)),
        (JOINED, SystemTurns(True, True)),
        (EITHER, SystemTurns(True, True)),
        (PARTS_ONLY, SystemTurns(True, True)),
        (USER_PARTS_ONLY, SystemTurns(True, True)),
        (FIRST_ONLY, SystemTurns(True, False)),
        (DROPS_LATER, SystemTurns(True, False)),
        (IN_TURN, SystemTurns(True, False)),
        (IN_TURN_WITHOUT_SYSTEM, SystemTurns(False, False)),
        (NO_SYSTEM, SystemTurns(False, False)),
        ("says nothing", SystemTurns(True, True)),
    ],
)
def test_a_template_tells_where_it_takes_the_system(template: str, expected: SystemTurns) -> None:
    render = renderer(template)
    assert system_turns(render, roles_in_parts(render)) == expected


@pytest.mark.parametrize(
    "template", [PLAIN, PARTS_ONLY, FIRST_ONLY, DROPS_LATER, IN_TURN, IN_TURN_WITHOUT_SYSTEM, NO_SYSTEM]
)
def test_every_text_comes_out_in_order(template: str) -> None:
    render = renderer(template)
    parted = roles_in_parts(render)
    turns = said_by_user([message(*said) for said in TALK], system_turns(render, parted))
    rendered = render([in_parts(turn, parted) for turn in turns])
    places = [rendered.index(text) for _, text in TALK]
    assert places == sorted(places)


def test_what_is_taken_stays_as_it_is() -> None:
    messages = [message(*said) for said in TALK]
    assert said_by_user(messages, SystemTurns()) == messages
    plain_talk = [message("user", "a"), message("user", "b"), message("assistant", "c")]
    assert said_by_user(plain_talk, SystemTurns(False, False)) == plain_talk


def test_it_joins_the_users_turn_beside_it_and_pictures_keep_their_order() -> None:
    picture, text = {"type": "image"}, {"type": "text", "text": "see"}
    turns = said_by_user(
        [message("user", [picture, text]), message("system", "late"), message("user", [picture])],
        SystemTurns(True, False),
    )
    gap, late = {"type": "text", "text": "\n\n"}, {"type": "text", "text": "late"}
    assert turns == [message("user", [picture, text, gap, late, gap, picture])]
    after_a_tool = [message("tool", "42"), message("system", "late")]
    assert said_by_user([message("user", "a"), *after_a_tool], SystemTurns(True, False))[1:] == [
        after_a_tool[0],
        message("user", "late"),
    ]
