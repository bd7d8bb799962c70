"""Images by address, from the request to the worker. Connections end in a fake wire; see `test_fetch.py`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from gateway.fetch import Fetcher
from gateway.linked_images import MAX_FETCHED_BYTES, LinkedImages
from tests.gateway.fakes import World, route, world
from tests.gateway.test_fetch import PNG, PUBLIC, Names, Wire, answer

ALSO_PUBLIC = "93.184.215.15"
GIF = b"GIF89a" + b"pixels" * 10


@pytest.fixture
async def fetching() -> AsyncIterator[World]:
    async with world(over_tcp=False, config={"fetch_urls": True}) as here:
        await here.publish(route(here.worker, supports_images=True))
        yield here


def play(here: World, *replies: Any, **by: Any) -> Wire:
    wire = Wire(*replies, **by)
    names = Names(cat_example=[[PUBLIC]], dog_example=[[ALSO_PUBLIC]], inside_example=[["10.0.0.1"]])
    here.app.state.services.linked_images = LinkedImages(Fetcher(names, wire))
    return wire


async def ask(here: World, *urls: str) -> httpx.Response:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return await here.chat([*parts, {"type": "text", "text": "what is this"}])  # type: ignore[arg-type]


async def test_the_worker_gets_the_bytes_and_their_true_type_in_the_request_s_order(fetching: World) -> None:
    play(fetching, by_address={PUBLIC: answer(PNG, content_type="text/html"), ALSO_PUBLIC: answer(GIF)})
    inline = "data:image/jpeg;base64,aGk="
    assert (await ask(fetching, "http://cat.example/1", inline, "http://dog.example/2")).status_code == 200
    images = [part.image for part in fetching.worker.requests[0].chat.messages[0].parts if part.HasField("image")]
    assert [(image.data, image.mime_type) for image in images] == [
        (PNG, "image/png"),
        (b"hi", "image/jpeg"),
        (GIF, "image/gif"),
    ]


async def test_a_refused_address_is_a_400_that_names_its_field_and_reaches_no_worker(fetching: World) -> None:
    wire = play(fetching, answer(PNG))
    reply = await ask(fetching, "http://cat.example/1", "http://inside.example/2")
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == "messages[0].content[1].image_url.url"
    assert "inside" not in error["message"]
    assert "10.0.0.1" not in reply.text
    assert wire.connected == [(PUBLIC, 80)]
    assert fetching.worker.requests == []


async def test_all_images_of_a_request_share_one_budget(fetching: World) -> None:
    half = PNG + b"x" * (MAX_FETCHED_BYTES // 2)
    play(fetching, answer(half), answer(half))
    reply = await ask(fetching, "http://cat.example/1", "http://cat.example/2")
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "messages[0].content[1].image_url.url"


async def test_nothing_is_fetched_unless_the_configuration_says_so(called: World) -> None:
    await called.publish(route(called.worker, supports_images=True))
    reply = await ask(called, "https://cat.example/1")
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "unsupported_parameter"
    assert reply.json()["error"]["param"] == "messages[0].content[0].image_url.url"
    assert "data: URL" in reply.json()["error"]["message"]
    assert called.worker.requests == []


async def test_nothing_is_fetched_for_a_model_that_takes_no_images(fetching: World) -> None:
    wire = play(fetching, answer(PNG))
    await fetching.publish(route(fetching.worker, supports_images=False, vocab_size=1))
    assert (await ask(fetching, "http://cat.example/1")).status_code == 400
    assert wire.connected == []
