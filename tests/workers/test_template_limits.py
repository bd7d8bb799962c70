"""Chat templates that are bombs: each is an error in words within its time, and the thread serves the next request."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hostler.errors import InvalidRequest

from workers.engine import ChatPrompt
from workers.text import prompts
from workers.text.prompts import PromptEncoder
from workers.text.time_limit import TookTooLong, at_most

GOOD = "{% for m in messages %}{{ m.content }}{% endfor %}"
# Told by their own message, so that what the encoder tries at the start is harmless.
LOOPS = (
    "{% for a in range(90000) %}{% for b in range(90000) %}{% for c in range(90000) %}{% endfor %}" + "{% endfor %}" * 2
)
RECURSION = "{% macro f(x) %}{{ f(x + 1) }}{% endmacro %}{{ f(0) }}"
ESCAPES = [
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
]


def encoder_of(template: str, tiny_model: Path) -> PromptEncoder:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{% if messages[-1].content == 'now' %}" + template + "{% else %}" + GOOD + "{% endif %}"
    return PromptEncoder(tokenizer, 1024, 4096)


def chat(text: str) -> ChatPrompt:
    return ChatPrompt([{"role": "user", "content": text}])


def test_a_template_that_loops_for_ever_is_stopped_and_the_thread_goes_on(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "TEMPLATE_LIMIT_S", 0.3)
    encoder = encoder_of(LOOPS, tiny_model)
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(InvalidRequest, match=r"longer than 0\.3 s"):
            encoder.encode(chat("now"))
        assert time.monotonic() - began < 5
    assert encoder.encode(chat("hello"))


def test_a_template_that_calls_itself_for_ever_is_an_error_in_words(tiny_model: Path) -> None:
    encoder = encoder_of(RECURSION, tiny_model)
    with pytest.raises(InvalidRequest, match="RecursionError"):
        encoder.encode(chat("now"))
    assert encoder.encode(chat("hello"))


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_reaches_nothing_but_its_messages(tiny_model: Path, template: str) -> None:
    encoder = encoder_of(template, tiny_model)
    with pytest.raises(InvalidRequest, match="refuses these messages"):
        encoder.encode(chat("now"))


def test_a_template_that_is_a_bomb_from_the_start_does_not_hang_the_load(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setattr(prompts, "TEMPLATE_LIMIT_S", 0.05)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = LOOPS
    began = time.monotonic()
    PromptEncoder(tokenizer, 1024, 4096)
    assert time.monotonic() - began < 30


def test_what_is_in_time_is_not_stopped_later() -> None:
    for _ in range(50):
        with at_most(0.02):
            pass
    deadline = time.monotonic() + 0.1
    while time.monotonic() < deadline:
        pass


def test_only_the_thread_that_is_late_is_stopped() -> None:
    seen: list[str] = []

    def late() -> None:
        try:
            with at_most(0.1):
                while True:
                    pass
        except TookTooLong:
            seen.append("stopped")

    thread = threading.Thread(target=late)
    thread.start()
    with at_most(20):
        thread.join(10)
    assert seen == ["stopped"]
