"""Adapters from the configuration file to replies over HTTP, beside their base model in one worker."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import NotFoundError, OpenAI

from tests.journeys.server import Server, Servers, wait_until
from tests.models.adapters import write_adapter

pytestmark = [pytest.mark.journey, pytest.mark.timeout(240)]

CONFIG = """\
gateways: 1
models:
  - name: tiny
    source: {source}
    dtype: float32
    adapters:
      first: {first}
      second: {second}
"""


@pytest.fixture(scope="module")
def adapted_server(module_servers: Servers, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    place = tmp_path_factory.mktemp("adapters")
    first = write_adapter(place / "first", tiny_model, seed=1)
    second = write_adapter(place / "second", tiny_model, seed=2, targets=("q_proj", "v_proj"))
    config = CONFIG.format(source=tiny_model, first=first, second=second)
    server = module_servers(config=config, wait_ready=False)
    # Nothing is preloaded, so nothing is ready until it is asked for.
    wait_until(lambda: is_listing(server), 90, "the list of models")
    return server


def is_listing(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/v1/models", timeout=5).is_success
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def client(adapted_server: Server) -> OpenAI:
    return OpenAI(base_url=f"{adapted_server.url}/v1", api_key="none", max_retries=3)


def ask(client: OpenAI, model: str, **fields: Any) -> Any:
    messages: Any = [{"role": "user", "content": "Tell me something about adapters."}]
    return client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=24, **fields)


def test_an_adapter_loads_its_model_on_demand_and_every_name_has_replies_of_its_own(client: OpenAI) -> None:
    names = ("second", "tiny", "first")
    replies = {name: ask(client, name) for name in names}
    assert {name: reply.model for name, reply in replies.items()} == {name: name for name in names}
    texts = {name: reply.choices[0].message.content for name, reply in replies.items()}
    assert len(set(texts.values())) == 3
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(lambda name: (name, ask(client, name).choices[0].message.content), names * 2))
    assert together == [(name, texts[name]) for name in names * 2]
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, "first", stream=True))
    assert streamed == texts["first"]


def test_adapters_are_listed_with_their_parent_and_an_unknown_one_is_not_found(
    adapted_server: Server, client: OpenAI
) -> None:
    listed = {model.id: getattr(model, "parent", None) for model in client.models.list()}
    assert {name: parent for name, parent in listed.items() if name in ("tiny", "first", "second")} == {
        "tiny": None,
        "first": "tiny",
        "second": "tiny",
    }
    assert httpx.get(f"{adapted_server.url}/v1/models/second").json()["parent"] == "tiny"
    with pytest.raises(NotFoundError) as caught:
        ask(client, "third")
    assert caught.value.code == "model_not_found"
