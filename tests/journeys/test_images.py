"""A picture's whole way, from the OpenAI SDK to a model whose answer depends on it."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI

from tests.journeys.server import Server, Servers
from tests.models.tiny_vision import COLOURS, QUESTIONS, picture

pytestmark = [pytest.mark.journey, pytest.mark.timeout(300)]

CONFIG = """\
gateways: 1
models:
  - name: colours
    source: {source}
    dtype: float32
    preload: true
"""


@pytest.fixture(scope="module")
def seeing_server(module_servers: Servers, tiny_llava: Path) -> Server:
    return module_servers(config=CONFIG.format(source=tiny_llava), ready_within_s=180)


def image_part(data: bytes, kind: str = "png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}}


def encoded(colour: str, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture(colour, seed=123, width=200, height=150).save(buffer, kind)
    return buffer.getvalue()


def ask(server: Server, *parts: dict[str, Any], **fields: Any) -> Any:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    content = [*parts, {"type": "text", "text": QUESTIONS[0]}]
    messages: Any = [{"role": "user", "content": content}]
    return client.chat.completions.create(model="colours", messages=messages, temperature=0, **fields)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_eight_pictures_get_eight_right_answers(seeing_server: Server, kind: str) -> None:
    answers = {colour: ask(seeing_server, image_part(encoded(colour, kind), kind.lower())) for colour in COLOURS}
    assert {colour: reply.choices[0].message.content for colour, reply in answers.items()} == {c: c for c in COLOURS}
    assert all(reply.usage.prompt_tokens > 16 for reply in answers.values())


def test_a_streamed_reply_and_two_choices_see_the_same_picture(seeing_server: Server) -> None:
    part = image_part(encoded("purple"))
    chunks = list(ask(seeing_server, part, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "purple"
    assert [choice.message.content for choice in ask(seeing_server, part, n=2).choices] == ["purple", "purple"]


def test_a_broken_picture_is_a_400_and_the_next_request_is_served(seeing_server: Server) -> None:
    whole = encoded("red")
    for data in (b"no image at all", whole[: len(whole) // 2]):
        with pytest.raises(BadRequestError) as caught:
            ask(seeing_server, image_part(data))
        assert caught.value.param == "messages"
    assert ask(seeing_server, image_part(whole)).choices[0].message.content == "red"


def test_an_address_is_refused_unless_allowed_and_text_is_still_text(seeing_server: Server) -> None:
    linked = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}}
    with pytest.raises(BadRequestError, match="does not fetch addresses"):
        ask(seeing_server, linked)
    body = {"model": "colours", "messages": [{"role": "user", "content": "<image> hello"}], "max_tokens": 3}
    reply = httpx.post(f"{seeing_server.url}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == 200
    assert reply.json()["usage"]["prompt_tokens"] < 30
