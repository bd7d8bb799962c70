"""/v1/responses with tools of MCP servers: real HTTP, real servers over stdio, a worker that does as the test says."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hostler.inference.v1 import inference_pb2 as pb

from tests.gateway.fakes import MODEL, World, counting, finish, route, text, world
from tests.gateway.responses_schema import check_item, check_response, check_stream

HERE = Path(__file__).parent
VILLAIN = {"command": [sys.executable, str(HERE / "mcp_villain.py")], "timeout": "0.4s", "max_result": 100_000}
SHOP = {"command": [sys.executable, str(HERE / "mcp_program.py"), "stdio"]}
FREE = {"type": "mcp", "server_label": "villain", "require_approval": "never"}
ASKED = {"type": "mcp", "server_label": "villain"}


@asynccontextmanager
async def serving(**config: Any) -> AsyncIterator[World]:
    servers = {"villain": VILLAIN, "shop": SHOP, "gone": {"command": ["/no/such/program"]}}
    async with world(config={"mcp_servers": servers, **config}) as here:
        here.worker.answer = counting()
        await here.publish(route(here.worker, supports_tools=True))
        yield here


@pytest.fixture
async def shop() -> AsyncIterator[World]:
    async with serving() as here:
        yield here


def call(name: str, arguments: dict[str, Any] | str, index: int = 0) -> list[pb.GenerateResponse]:
    written = arguments if isinstance(arguments, str) else json.dumps(arguments)
    half = len(written) // 2
    return [
        pb.GenerateResponse(tool_call_start=pb.ToolCallStart(index=index, id=f"c{index}", name=name)),
        pb.GenerateResponse(tool_call_arguments=pb.ToolCallArguments(index=index, json_fragment=written[:half])),
        pb.GenerateResponse(tool_call_arguments=pb.ToolCallArguments(index=index, json_fragment=written[half:])),
        pb.GenerateResponse(tool_call_end=pb.ToolCallEnd(index=index)),
    ]


Say = Callable[[pb.GenerateRequest], list[pb.GenerateResponse]]


def turns(*says: Say | list[pb.GenerateResponse]) -> Any:
    """A model that does one thing in each turn, and repeats the last."""
    number = -1

    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        nonlocal number
        number = min(number + 1, len(says) - 1)
        say = says[number]
        events = say(request) if callable(say) else say
        for event in events:
            yield event
        called = any(event.WhichOneof("event") == "tool_call_start" for event in events)
        yield finish(7, pb.FINISH_REASON_TOOL_CALLS if called else pb.FINISH_REASON_STOP)

    return script


def results(request: pb.GenerateRequest) -> list[str]:
    return ["".join(part.text for part in m.parts) for m in request.chat.messages if m.role == pb.ROLE_TOOL]


def tell(request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    return [text(" | ".join(results(request)) or "nothing")]


async def ask(here: World, *tools: dict[str, Any], input: Any = "go", **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "input": input, "tools": list(tools), **fields}
    return await here.client.post("/v1/responses", json=body, timeout=20)


async def answered(here: World, *tools: dict[str, Any], **fields: Any) -> dict[str, Any]:
    reply = await ask(here, *tools, stream=True, **fields)
    assert reply.status_code == 200, reply.text
    response = check_stream(reply.text)[-1]["response"]
    for item in response["output"]:
        check_item(item)
    return check_response(response)


def kinds(response: dict[str, Any]) -> list[str]:
    return [item["type"] for item in response["output"]]


def said(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])


async def test_one_request_answers_a_question_that_needs_two_calls(shop: World) -> None:
    shop.worker.script = turns(
        call("find_order", {"customer": "Ada"}),
        lambda request: call("get_price", {"order_id": results(request)[-1].split()[-1].strip(".")}),
        lambda request: [text(f"Here: {results(request)[-1]}")],
    )
    tool = {"type": "mcp", "server_label": "shop", "require_approval": {"never": {"read_only": True}}}
    reply = await ask(shop, tool, input="What does Ada's order cost?", stream=True)
    events = check_stream(reply.text)
    response = events[-1]["response"]
    assert kinds(response) == ["mcp_list_tools", "mcp_call", "mcp_call", "message"]
    assert said(response) == "Here: The order A-17 costs 129 euros."
    assert response["output"][1]["output"] == "The order id of Ada is A-17."
    assert response["output"][2]["arguments"] == '{"order_id": "A-17"}'
    assert response["usage"]["output_tokens"] == 21
    assert response["usage"]["input_tokens"] == 15
    own = [event["type"].removeprefix("response.") for event in events if event.get("output_index") in (0, 1)]
    listing, one_call = own[: own.index("output_item.done") + 1], own[own.index("output_item.done") + 1 :]
    assert listing == [
        "output_item.added",
        "mcp_list_tools.in_progress",
        "mcp_list_tools.completed",
        "output_item.done",
    ]
    assert one_call == [
        "output_item.added",
        "mcp_call.in_progress",
        "mcp_call_arguments.delta",
        "mcp_call_arguments.delta",
        "mcp_call_arguments.done",
        "mcp_call.completed",
        "output_item.done",
    ]
    seen = shop.worker.requests[-1].chat
    roles = [message.role for message in seen.messages]
    assert roles == [pb.ROLE_USER, *[pb.ROLE_ASSISTANT, pb.ROLE_TOOL] * 2]
    assert {"find_order", "get_price", "cancel_order"} <= {tool.name for tool in seen.tools}
    shop.worker.script = turns([text("again")])
    whole = await ask(shop, tool, input="again")
    assert kinds(check_response(whole.json())) == ["mcp_list_tools", "message"]


@pytest.mark.parametrize(
    ("name", "arguments", "error", "words"),
    [
        ("hang", {}, "mcp_protocol_error", "did not answer the call within 0.4 s"),
        ("flood", {}, "mcp_protocol_error", "sent more than 100000 bytes"),
        ("die", {}, "mcp_protocol_error", "ended with exit code 3"),
        ("deaf", {}, "mcp_protocol_error", "within 0.4 s"),
        ("refuse", {}, "mcp_protocol_error", "not today"),
        ("fail", {}, "mcp_tool_execution_error", "no such thing"),
        ("echo", "[1]", "mcp_protocol_error", "not a JSON object"),
        ("echo", '{"a": NaN}', "mcp_protocol_error", "not a JSON object"),
    ],
)
async def test_whatever_a_server_does_ends_in_an_item_and_the_response_completes(
    shop: World, name: str, arguments: Any, error: str, words: str
) -> None:
    shop.worker.script = turns(call(name, arguments), tell)
    response = await answered(shop, FREE)
    assert response["status"] == "completed"
    item = response["output"][1]
    assert (item["type"], item["status"], item["error"]["type"]) == ("mcp_call", "failed", error)
    assert words in json.dumps(item["error"])
    assert words in said(response)
    assert "secret" not in json.dumps(response)


async def test_a_server_that_cannot_start_leaves_a_failed_listing_and_an_answer(shop: World) -> None:
    shop.worker.script = turns([text("alone")])
    response = await answered(shop, {"type": "mcp", "server_label": "gone"})
    assert kinds(response) == ["mcp_list_tools", "message"]
    assert "there is no '/no/such/program'" in response["output"][0]["error"]


async def test_a_changed_tool_is_off_and_says_so(shop: World) -> None:
    shop.worker.script = turns(call("change", {}), call("echo", {"text": "x"}), tell, call("echo", {}), tell)
    response = await answered(shop, FREE)
    assert "has changed since it was first listed" in response["output"][2]["error"]["message"]
    later = await answered(shop, FREE)
    assert "'echo' has changed" in later["output"][0]["error"]
    assert "echo" not in [tool["name"] for tool in later["output"][0]["tools"]]
    assert later["status"] == "completed"


async def test_calls_wait_for_approval_and_each_answer_is_heard_once(shop: World) -> None:
    shop.worker.script = turns(
        [*call("echo", {"text": "one"}), *call("sums", {"text": "1+1"}, 1)], tell, [text("never mind")]
    )
    response = await answered(shop, ASKED)
    assert kinds(response) == ["mcp_list_tools", "mcp_approval_request", "mcp_approval_request"]
    first, second = response["output"][1]["id"], response["output"][2]["id"]
    answers = [
        {"type": "mcp_approval_response", "approval_request_id": first, "approve": True},
        {"type": "mcp_approval_response", "approval_request_id": second, "approve": False, "reason": "too dear"},
    ]
    previous = response["id"]
    done = await answered(shop, ASKED, input=answers, previous_response_id=previous)
    assert kinds(done) == ["mcp_call", "mcp_call", "message"]
    by_request = {item["approval_request_id"]: item for item in done["output"][:2]}
    assert by_request[first]["output"] == "one"
    assert "did not approve this call. They say: too dear" in by_request[second]["error"]["message"]
    assert "one" in said(done)
    assert "too dear" in said(done)
    again = await ask(shop, ASKED, input=answers, previous_response_id=done["id"])
    assert (again.status_code, again.json()["error"]["param"]) == (400, "input[0].approval_request_id")
    other = await ask(shop, {"type": "mcp", "server_label": "shop"}, input=answers, previous_response_id=previous)
    assert "which is not in 'tools'" in other.json()["error"]["message"]
    unknown = [{"type": "mcp_approval_response", "approval_request_id": "mcpr_x", "approve": True}]
    assert (await ask(shop, ASKED, input=unknown)).status_code == 400
    # A client that keeps no state on the server sends everything itself.
    alone = [{"role": "user", "content": "go"}, *response["output"], answers[0]]
    stateless = await answered(shop, ASKED, input=alone, store=False)
    assert kinds(stateless) == ["mcp_call", "message"]


async def test_a_listed_server_is_not_listed_again_in_the_next_turn(shop: World) -> None:
    shop.worker.script = turns(call("sums", {"text": "2+2"}), tell, call("sums", {"text": "3+3"}), tell)
    first = await answered(shop, FREE)
    second = await answered(shop, FREE, previous_response_id=first["id"])
    assert kinds(second) == ["mcp_call", "message"]
    assert said(second) == "4 | 6"
    sent = shop.worker.requests[-1].chat.messages
    assert [call.name for message in sent for call in message.tool_calls] == ["sums", "sums"]


async def test_no_more_calls_are_made_than_the_request_allows(shop: World) -> None:
    def greedy(request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
        if request.chat.tool_choice.mode == pb.TOOL_CHOICE_MODE_NONE:
            return tell(request)
        return [*call("echo", {"text": "a"}), *call("echo", {"text": "b"}, 1)]

    shop.worker.script = turns(greedy)
    response = await answered(shop, FREE, max_tool_calls=3)
    assert kinds(response) == ["mcp_list_tools", *["mcp_call"] * 3, "message"]
    assert said(response) == "a | b | a"
    unbounded = await answered(shop, FREE)
    assert unbounded["status"] == "completed"
    assert kinds(unbounded).count("mcp_call") == 62


async def test_tool_choice_reaches_servers_tools_and_is_met_by_one_call(shop: World) -> None:
    shop.worker.script = turns(call("echo", {"text": "x"}), tell)
    await answered(shop, FREE, tool_choice={"type": "mcp", "server_label": "villain", "name": "echo"})
    demanded, after = (request.chat.tool_choice for request in shop.worker.requests)
    assert (demanded.mode, list(demanded.allowed_names)) == (pb.TOOL_CHOICE_MODE_REQUIRED, ["echo"])
    assert (after.mode, list(after.allowed_names)) == (pb.TOOL_CHOICE_MODE_AUTO, [])
    missing = await ask(shop, FREE, tool_choice={"type": "mcp", "server_label": "villain", "name": "nope"})
    assert missing.json()["status"] == "failed" if missing.status_code == 200 else missing.status_code == 400
    some = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp", "server_label": "villain"}]}
    await answered(shop, FREE, tool_choice=some)
    assert len(shop.worker.requests[-1].chat.tool_choice.allowed_names) == 11


async def test_the_clients_own_tools_go_back_to_it_beside_the_servers(shop: World) -> None:
    own = {"type": "function", "name": "echo", "parameters": {"type": "object"}}
    shop.worker.script = turns([*call("echo", {"mine": 1}), *call("villain__echo", {"text": "theirs"}, 1)], tell)
    response = await answered(shop, own, FREE)
    assert kinds(response) == ["mcp_list_tools", "function_call", "mcp_call"]
    assert response["output"][2]["output"] == "theirs"
    output = {"type": "function_call_output", "call_id": response["output"][1]["call_id"], "output": "ours"}
    after = await answered(shop, own, FREE, input=[output], previous_response_id=response["id"])
    assert said(after) == "theirs | ours"


async def test_filters_say_which_tools_are_seen(shop: World) -> None:
    shop.worker.script = turns([text("ok")])
    for allowed, seen in (
        (["echo", "die", "nothing"], ["echo", "die"]),
        ({"read_only": True}, ["echo", "sums"]),
        ({"read_only": True, "tool_names": ["sums", "die"]}, ["sums"]),
        ([], []),
    ):
        response = await answered(shop, {**FREE, "allowed_tools": allowed})
        assert [tool.name for tool in shop.worker.requests[-1].chat.tools] == seen
        assert [tool["name"] for tool in response["output"][0]["tools"]] == seen


async def test_a_long_result_is_cut_to_what_the_model_has_room_for(shop: World) -> None:
    shop.worker.answer = counting(400)
    small = route(shop.worker, supports_tools=True)
    small.info.max_context_tokens = 400
    await shop.publish(small)
    shop.worker.script = turns(call("big", {"text": "5000"}), [text("long")])
    response = await answered(shop, FREE)
    output = response["output"][1]["output"]
    assert "[cut: the first" in output
    assert 100 < len(output.split()) < 400


async def test_in_the_background_it_runs_on_and_a_cancel_ends_the_call(shop: World) -> None:
    shop.worker.script = turns(call("sums", {"text": "20+22"}), tell, call("hang", {}))
    started = (await ask(shop, FREE, background=True)).json()
    async with asyncio.timeout(10):
        while (response := (await shop.client.get(f"/v1/responses/{started['id']}")).json())["status"] != "completed":
            await asyncio.sleep(0.02)
    assert said(check_response(response)) == "42"
    events = await shop.client.get(f"/v1/responses/{started['id']}?stream=true")
    assert kinds(check_stream(events.text)[-1]["response"]) == ["mcp_list_tools", "mcp_call", "message"]


async def test_what_a_request_may_not_ask_for_is_refused_by_name(shop: World) -> None:
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"server_label": "nobody"}, 400, "tools[0].server_label"),
        ({"server_label": "a b"}, 400, "tools[0].server_label"),
        ({"server_label": "x", "server_url": "https://mcp.example.com/"}, 403, "tools[0].server_url"),
        ({"server_label": "villain", "headers": {"a": "b"}}, 400, "tools[0].headers"),
        ({"server_label": "x", "server_url": "https://a/", "headers": {"Host": "b"}}, 400, "tools[0].headers"),
        ({"server_label": "villain", "connector_id": "connector_gmail"}, 400, "tools[0].connector_id"),
        ({"server_label": "villain", "require_approval": "perhaps"}, 400, "tools[0].require_approval"),
        ({"server_label": "villain", "allowed_tools": [1]}, 400, "tools[0].allowed_tools"),
    ]
    for fields, status, param in cases:
        reply = await ask(shop, {"type": "mcp", **fields})
        assert (reply.status_code, reply.json()["error"]["param"]) == (status, param), reply.text
    twice = await ask(shop, FREE, FREE)
    assert twice.json()["error"]["param"] == "tools[1].server_label"
    await shop.publish(route(shop.worker, supports_images=True))
    assert (await ask(shop, FREE)).json()["error"]["code"] == "unsupported_parameter"


async def test_no_secret_of_a_request_is_stored_shown_or_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(mcp_urls=True) as here:
        here.worker.script = turns([text("ok")])
        here.app.state.services.mcp.resolve = lambda host, port: asyncio.sleep(0, ["169.254.169.254"])
        tool = {
            "type": "mcp",
            "server_label": "far",
            "server_url": "http://metadata.example/mcp",
            "headers": {"X-Key": "sesame-1"},
            "authorization": "sesame-2",
        }
        with caplog.at_level("DEBUG"):
            response = await answered(here, tool)
        assert "not known as a public one" in response["output"][0]["error"]
        stored = await here.client.get(f"/v1/responses/{response['id']}")
        assert "sesame" not in json.dumps(response) + stored.text + caplog.text
