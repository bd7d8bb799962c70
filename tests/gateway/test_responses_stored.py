"""Stored responses and conversations over real HTTP and gRPC: continued, fetched, listed, deleted, kept apart."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson
from hostler.inference.v1 import inference_pb2 as pb

from tests.gateway.fakes import MODEL, World, echo, finish, route, world
from tests.gateway.responses_schema import check_conversation, check_item, check_response
from tests.gateway.test_responses import ECHO_TOOL, answered, ask, prompt, words


async def test_a_response_continues_an_earlier_one_without_its_instructions(served: World) -> None:
    first = await answered(served, "one", instructions="be brief")
    second = await answered(served, "two", previous_response_id=first["id"])
    assert prompt(served) == ["one", "one", "two"]
    assert second["previous_response_id"] == first["id"]
    assert second["instructions"] is None
    await answered(served, "three", previous_response_id=second["id"], instructions="be loud")
    assert prompt(served) == ["be loud", "one", "one", "two", "two", "three"]


async def test_calls_and_their_results_continue_across_responses(served: World) -> None:
    async def call(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(tool_call_start=pb.ToolCallStart(index=0, id="call_1", name="echo"))
        yield pb.GenerateResponse(tool_call_arguments=pb.ToolCallArguments(index=0, json_fragment='{"x":1}'))
        yield pb.GenerateResponse(tool_call_end=pb.ToolCallEnd(index=0))
        yield finish(1, pb.FINISH_REASON_TOOL_CALLS)

    served.worker.script = call
    await served.publish(route(served.worker, supports_tools=True))
    first = await answered(served, "use it", tools=[ECHO_TOOL], tool_choice="required")
    assert first["output"][0]["type"] == "function_call"
    served.worker.script = echo
    result = {"type": "function_call_output", "call_id": "call_1", "output": "forty two"}
    second = await answered(served, [result], previous_response_id=first["id"], tools=[ECHO_TOOL])
    assert words(second) == "forty two"
    seen = served.worker.requests[-1].chat.messages
    assert [(c.id, c.name, c.arguments_json) for c in seen[1].tool_calls] == [("call_1", "echo", '{"x":1}')]
    assert (seen[2].role, seen[2].tool_call_id) == (pb.ROLE_TOOL, "call_1")
    listed = (await served.client.get(f"/v1/responses/{second['id']}/input_items")).json()
    for item in listed["data"]:
        check_item(item)


async def test_items_can_be_referred_to_by_their_ids(served: World) -> None:
    first = await answered(served, "one")
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    second = await answered(served, [reference, {"role": "user", "content": "two"}])
    assert prompt(served) == ["one", "two"]
    # In a later turn, too: what was referred to was kept.
    await answered(served, [{"id": reference["id"]}, "three"], previous_response_id=second["id"])
    assert prompt(served) == ["one", "two", "two", "three"]
    missing = await ask(served, [{"type": "item_reference", "id": "msg_nobody"}])
    assert missing.status_code == 404
    assert "msg_nobody" in missing.json()["error"]["message"]


async def test_what_is_not_to_be_stored_is_not(served: World) -> None:
    response = await answered(served, "secret", store=False)
    assert response["store"] is False
    assert (await served.client.get(f"/v1/responses/{response['id']}")).status_code == 404
    again = await ask(served, "more", previous_response_id=response["id"])
    assert again.status_code == 400
    error = again.json()["error"]
    assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")


async def test_a_stored_response_is_what_was_answered_until_it_is_deleted(served: World) -> None:
    response = await answered(served, "one", metadata={"k": "v"})
    fetched = await served.client.get(f"/v1/responses/{response['id']}")
    assert check_response(fetched.json()) == response
    deleted = (await served.client.delete(f"/v1/responses/{response['id']}")).json()
    assert deleted == {"id": response["id"], "object": "response", "deleted": True}
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")):
        gone = await served.client.request(method, f"/v1/responses/{response['id']}{path}")
        assert gone.status_code == 404
        assert gone.json()["error"]["code"] == "not_found"


async def test_a_stream_is_stored_before_it_says_that_it_is_complete(served: World) -> None:
    async with served.client.stream("POST", "/v1/responses", json={"model": MODEL, "input": "x", "stream": True}) as r:
        async for line in r.aiter_lines():
            if line.startswith('data: {"type":"response.completed"'):
                response = orjson.loads(line[6:])["response"]
                fetched = await served.client.get(f"/v1/responses/{response['id']}")
                assert fetched.json() == response


async def test_input_items_come_page_by_page(served: World) -> None:
    items = [{"role": "user", "content": str(number)} for number in range(5)]
    response = await answered(served, items)
    path = f"/v1/responses/{response['id']}/input_items"

    async def page(**query: Any) -> tuple[list[str], bool, str]:
        found = (await served.client.get(path, params=query)).json()
        for item in found["data"]:
            check_item(item)
        return [item["content"][0]["text"] for item in found["data"]], found["has_more"], found["last_id"]

    assert await page() == (["4", "3", "2", "1", "0"], False, (await page(order="asc", limit=1))[2])
    first, more, last = await page(order="asc", limit=2)
    assert (first, more) == (["0", "1"], True)
    assert (await page(order="asc", limit=3, after=last))[:2] == (["2", "3", "4"], False)
    for query in ({"limit": 0}, {"limit": 101}, {"limit": "x"}, {"order": "up"}, {"after": "msg_no"}):
        refused = await served.client.get(path, params=query)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == next(iter(query))


async def test_conversations_grow_with_responses_and_are_read_and_deleted(served: World) -> None:
    made = await served.client.post("/v1/conversations", json={"metadata": {"a": "b"}})
    conversation = made.json()
    path = f"/v1/conversations/{conversation['id']}"
    response = await answered(served, "one", conversation=conversation["id"])
    assert response["conversation"] == {"id": conversation["id"]}
    await answered(served, "two", conversation={"id": conversation["id"]}, store=True)
    assert prompt(served) == ["one", "one", "two"]
    listed = (await served.client.get(f"{path}/items", params={"order": "asc"})).json()["data"]
    check_conversation(conversation, listed)
    assert [item["content"][0]["text"] for item in listed] == ["one", "one", "two", "two"]
    added = await served.client.post(f"{path}/items", json={"items": [{"role": "user", "content": "extra"}]})
    item = added.json()["data"][0]
    assert (await served.client.get(f"{path}/items/{item['id']}")).json() == item
    assert (await served.client.delete(f"{path}/items/{item['id']}")).json() == conversation
    assert (await served.client.get(f"{path}/items/{item['id']}")).status_code == 404
    changed = (await served.client.post(path, json={"metadata": {"c": "d"}})).json()
    assert (await served.client.get(path)).json() == changed == {**conversation, "metadata": {"c": "d"}}
    refused = await ask(served, "x", previous_response_id=response["id"])
    assert conversation["id"] in refused.json()["error"]["message"]
    assert (await served.client.delete(path)).json()["deleted"] is True
    for gone in (await served.client.get(path), await ask(served, "x", conversation=conversation["id"])):
        assert gone.status_code == 404
    assert (await served.client.get(f"/v1/responses/{response['id']}")).status_code == 200


async def test_what_one_key_made_does_not_exist_for_another() -> None:
    """Our own rule: two gateways of one store, as after a change of the key."""
    keys = ["k" * 32, "o" * 32]
    async with world(over_tcp=False, config={"api_key": keys[0]}) as here:
        headers = {"authorization": f"Bearer {keys[0]}"}
        made = await here.client.post("/v1/responses", json={"model": MODEL, "input": "x"}, headers=headers)
        item = made.json()["output"][0]["id"]
        directory = here.app.state.services.responses._temporary
        config = {"api_key": keys[1], "responses_dir": directory}
        async with world(over_tcp=False, config=config) as there:
            there.client.headers["authorization"] = f"Bearer {keys[1]}"
            path = f"/v1/responses/{made.json()['id']}"
            assert (await there.client.get(path)).status_code == 404
            assert (await there.client.delete(path)).status_code == 404
            assert (await ask(there, "y", previous_response_id=made.json()["id"])).status_code == 400
            assert (await ask(there, [{"type": "item_reference", "id": item}])).status_code == 404
        assert (await here.client.get(path, headers=headers)).status_code == 200


async def test_a_server_that_stores_nothing_says_so() -> None:
    async with world(over_tcp=False, config={"responses_max_count": 0}) as here:
        response = await answered(here, "x", store=True)
        assert response["store"] is False
        assert (await here.client.get(f"/v1/responses/{response['id']}")).status_code == 404
        assert (await ask(here, "x", background=True)).json()["error"]["param"] == "background"
        assert (await here.client.post("/v1/conversations", json={})).status_code == 400


async def test_an_answer_that_could_not_be_stored_is_still_an_answer(called: World) -> None:
    await answered(called, "x")
    called.app.state.services.responses._database._connection.execute("DROP TABLE items")
    response = await answered(called, "one two")
    assert words(response) == "one two"
    assert response["store"] is False
