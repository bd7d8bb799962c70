"""The part of a response that MCP servers have: their listings, the calls between the model's turns, approvals.

Above: `answer`; below: `gateway.mcp`, the dialect. Whatever a server does ends in an item; the response goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hostler.errors import InvalidRequest
from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.openai_responses.builder import ResponseBuilder
from gateway.dialects.openai_responses.items import Item
from gateway.dialects.openai_responses.mcp_items import McpCallItem, listing_of
from gateway.dialects.openai_responses.mcp_tools import McpSpec
from gateway.dialects.openai_responses.messages import build_messages
from gateway.dialects.openai_responses.output_items import Event
from gateway.dialects.openai_responses.request import ResponsesRequest
from gateway.dialects.openai_responses.tools import ToolBinding, model_name
from gateway.fields import show
from gateway.mcp.calls import MAX_TURNS, Call, Outcome, listed, make_all
from gateway.mcp.remote import Listing, McpFault, RemoteTool
from gateway.mcp.servers import McpServers
from gateway.mcp.turns import Count, fitted, next_choice

if TYPE_CHECKING:
    from gateway.mcp.connection import Connection


@dataclass(frozen=True, slots=True)
class Decision:
    """What somebody said to a request for approval."""

    request: Item
    approve: bool
    reason: str | None


def decisions(history: Sequence[Item], own: Sequence[Item], labels: Sequence[str]) -> list[Decision]:
    """Return the answers to requests for approval that this turn brings, in its order.

    Raises:
        InvalidRequest: one answers no request, or one that was answered before, or of a server that is not in `tools`.
    """
    items = [*history, *own]
    requests = {item["id"]: item for item in items if item["type"] == "mcp_approval_request"}
    answered = {item.get("approval_request_id") for item in items if item["type"] == "mcp_call"}
    found = []
    for index, item in enumerate(own):
        if item["type"] != "mcp_approval_response":
            continue
        identity, where = item["approval_request_id"], f"input[{index}].approval_request_id"
        request = requests.get(identity)
        if request is None:
            raise InvalidRequest(f"No request for approval {show(identity)} comes before its answer.", param=where)
        if identity in answered:
            # A client without a store sends the whole conversation again, old answers included.
            if any(later["type"] == "mcp_call" for later in own[index + 1 :]):
                continue
            raise InvalidRequest(f"The request for approval {show(identity)} was answered before.", param=where)
        if request["server_label"] not in labels:
            raise InvalidRequest(
                f"The call {show(identity)} is of the MCP server {show(request['server_label'])}, which is not in "
                "'tools' of this request.",
                param=where,
            )
        answered.add(identity)
        found.append(Decision(request, item["approve"], item.get("reason")))
    return found


class RemoteTurns:
    """One response's dealings with MCP servers.

    Args:
        request: names the servers.
        generate: the contract's message; mutated: tools, tool choice, messages and tokens that are left.
        builder: of the response.
        servers: all that this process may speak to.
        owner: whose request it is.
        items: of earlier turns and of this one.
        context: tokens of the model's context; 0 if unknown.
        count: counts a chat's tokens.

    Raises:
        HostlerError: a server is not configured, or may not be named; or an answer fits no request for approval.
    """

    def __init__(
        self,
        request: ResponsesRequest,
        generate: pb.GenerateRequest,
        builder: ResponseBuilder,
        servers: McpServers,
        owner: str,
        history: Sequence[Item],
        own: Sequence[Item],
        context: int,
        count: Count,
    ) -> None:
        self._request = request
        self._generate = generate
        self._builder = builder
        self._context = context
        self._count = count
        self._tools = request.tools
        self._specs = request.tools.mcp
        self._decisions = decisions(history, own, [spec.label for spec in self._specs])
        self._connections = {spec.label: _connection(servers, spec, owner) for spec in self._specs}
        self._known = {
            item["server_label"]: listing_of(item)
            for item in (*history, *own)
            if item["type"] == "mcp_list_tools" and item["tools"]
        }
        self._max_tokens = generate.max_tokens if generate.HasField("max_tokens") else None
        self._num_turns = 0
        self._named_one = isinstance(choice := request.echo["tool_choice"], dict) and (
            choice.get("type") != "allowed_tools"
        )

    async def begin(self) -> AsyncGenerator[Event, None]:
        """List the servers' tools where no earlier turn has, and make the calls that were approved.

        Raises:
            InvalidRequest: `tool_choice` names a tool that its server does not offer.
        """
        async with aclosing(self.offer()) as events:
            async for event in events:
                yield event
        async with aclosing(self._decided()) as events:
            async for event in events:
                yield event
        self._continue_prompt()
        self._builder.begin_turn()

    async def offer(self) -> AsyncGenerator[Event, None]:
        """List the servers' tools, and put them into the request.

        Raises:
            InvalidRequest: as `begin` says.
        """
        async with aclosing(self._listed()) as events:
            async for event in events:
                yield event
        nothing = Listing()
        listings = [(spec, self._known.get(spec.label, nothing).only(spec.allowed.takes)) for spec in self._specs]
        self._tools = self._tools.with_remote(listings)
        self._builder.use_tools(self._tools)
        del self._generate.chat.tools[:]
        self._generate.chat.tools.extend(self._tools.tools)
        self._choose()
        self._rename(self._generate.chat.messages)

    async def _listed(self) -> AsyncGenerator[Event, None]:
        waiting = []
        for spec in self._specs:
            if spec.label in self._known:
                continue
            item, events = self._builder.list_tools(spec.label)
            waiting.append((spec, item, asyncio.create_task(listed(self._connections[spec.label]))))
            for event in events:
                yield event
        try:
            for spec, item, task in waiting:
                try:
                    listing = (await task).only(spec.allowed.takes)
                except McpFault as fault:
                    events = item.fail(fault.message)
                else:
                    self._known[spec.label] = listing
                    events = item.complete(listing)
                for event in self._builder.settle(events):
                    yield event
        finally:
            for _, _, task in waiting:
                task.cancel()
            await asyncio.gather(*(task for _, _, task in waiting), return_exceptions=True)

    def _choose(self) -> None:
        """Add the servers' tools that `tool_choice` names, now that they are known."""
        if not self._tools.chosen:
            return
        choice = self._generate.chat.tool_choice
        choice.allowed_names.extend(self._tools.chosen_names())
        if choice.allowed_names:
            return
        if choice.mode == pb.TOOL_CHOICE_MODE_REQUIRED:
            raise InvalidRequest(
                "'tool_choice' demands a tool that its MCP server does not offer now.", param="tool_choice"
            )
        choice.mode = pb.TOOL_CHOICE_MODE_NONE

    async def _decided(self) -> AsyncGenerator[Event, None]:
        approved: list[tuple[McpCallItem, Call]] = []
        for decision in self._decisions:
            label, name = decision.request["server_label"], decision.request["name"]
            binding = self._find(label, name)
            known = binding or ToolBinding("mcp", name, label, RemoteTool(name, "", {}))
            item, events = self._builder.approved_call(known, decision.request)
            for event in events:
                yield event
            if decision.approve and binding is not None:
                approved.append((item, self._call(item)))
                continue
            said = f" They say: {decision.reason}" if decision.reason else ""
            fault = f"The user did not approve this call.{said}" if not decision.approve else f"No tool {show(name)}."
            for event in self._builder.settle(item.end(Outcome(fault=McpFault(fault)))):
                yield event
        async with aclosing(self._make(approved)) as made:
            async for event in made:
                yield event

    def _find(self, label: str, name: str) -> ToolBinding | None:
        bindings = self._tools.bindings.values()
        return next((b for b in bindings if (b.kind, b.namespace, b.name) == ("mcp", label, name)), None)

    def _call(self, item: McpCallItem) -> Call:
        binding = item.binding
        assert binding.remote is not None
        return Call(self._connections[binding.namespace], binding.remote, item.item["arguments"])

    async def _make(self, calls: Sequence[tuple[McpCallItem, Call]]) -> AsyncGenerator[Event, None]:
        together = self._request.makes_calls_together
        async with aclosing(make_all([call for _, call in calls], together=together)) as outcomes:
            number = 0
            async for outcome in outcomes:
                item = calls[number][0]
                number += 1
                outcome = await self._fitted(item, outcome)
                for event in self._builder.settle(item.end(outcome)):
                    yield event

    async def _fitted(self, item: McpCallItem, outcome: Outcome) -> Outcome:
        if not outcome.text:
            return outcome

        def with_result(outcome: Outcome) -> pb.Chat:
            chat = pb.Chat()
            chat.CopyFrom(self._generate.chat)
            own = [made for made in self._builder.new_items if made is not item.item]
            output = {**item.item, "output": outcome.for_model}
            chat.messages.extend(self._messages([*own, output]))
            return chat

        return await fitted(outcome, with_result, self._max_tokens, self._context, self._count)

    async def go_on(self) -> AsyncGenerator[Event, None]:
        """Make the calls that are due, and prepare the model's next turn; or end the response."""
        due = [(item, self._call(item)) for item in self._builder.due]
        async with aclosing(self._make(due)) as made:
            async for event in made:
                yield event
        self._num_turns += 1
        left = None if self._max_tokens is None else self._max_tokens - self._builder.usage.num_completion_tokens
        if self._builder.waits_for_client or (left is not None and left < 1):
            self._builder.due.clear()
            reason = None if self._builder.waits_for_client else "max_output_tokens"
            for event in self._builder.complete(reason):
                yield event
            return
        if left is not None:
            self._generate.max_tokens = left
        self._continue_prompt()
        may_call = self._builder.calls_left != 0 and self._num_turns < MAX_TURNS - 1
        choice = next_choice(
            self._generate.chat.tool_choice,
            named_one=self._named_one,
            own_names=self._tools.own_names(),
            may_call=may_call,
        )
        self._named_one = False
        self._generate.chat.tool_choice.CopyFrom(choice)
        self._builder.begin_turn()

    def _continue_prompt(self) -> None:
        self._generate.chat.messages.extend(self._messages(self._builder.new_items))

    def _messages(self, items: Sequence[dict[str, Any]]) -> list[pb.Message]:
        messages = build_messages(None, [("output", item) for item in items if _is_whole(item)], [])
        self._rename(messages)
        return messages

    def _rename(self, messages: Sequence[pb.Message]) -> None:
        """Give calls of servers' tools the names that these have in this request."""
        short = {
            model_name(binding.name, binding.namespace): name
            for name, binding in self._tools.bindings.items()
            if binding.kind == "mcp"
        }
        for message in messages:
            for call in message.tool_calls:
                call.name = short.get(call.name, call.name)
            if message.role == pb.ROLE_TOOL:
                message.name = short.get(message.name, message.name)


def _is_whole(item: dict[str, Any]) -> bool:
    return item["type"] != "mcp_call" or item["output"] is not None or item["error"] is not None


def _connection(servers: McpServers, spec: McpSpec, owner: str) -> Connection:
    if spec.url:
        return servers.at_address(spec.url, spec.headers, owner, f"{spec.where}.server_url")
    return servers.configured(spec.label, f"{spec.where}.server_label")
