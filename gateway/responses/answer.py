"""One response, from a validated request to its last event. Above: routes, `background`; below: dialect, `dispatch`.

`Answering.prepare` does all that can refuse a request before anything is spent on it; `Answer.events` does the rest.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from hostler.errors import ContextLengthExceeded, HostlerError, InvalidRequest, UnsupportedParameter
from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.openai_chat.request import ChatRequest, check_capabilities
from gateway.dialects.openai_responses.builder import ResponseBuilder
from gateway.dialects.openai_responses.items import Item, new_id
from gateway.dialects.openai_responses.output_items import Event
from gateway.dialects.openai_responses.request import ResponsesRequest
from gateway.dialects.openai_responses.response_object import in_this_dialect, new_response
from gateway.dispatch import Dispatcher, Loading
from gateway.errors import as_hostler_error
from gateway.fields import show
from gateway.linked_images import LinkedImages
from gateway.mcp.servers import McpServers
from gateway.responses.database import Database
from gateway.responses.errors import NotStored
from gateway.responses.remote_turns import RemoteTurns
from gateway.responses.store import ResponseStore
from gateway.responses.truncation import fit, surely_fits
from gateway.routing import RouteTable, Target, find_chat_model

ENDINGS = ("response.completed", "response.incomplete", "response.failed")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        request_id: names the request in logs.
        owner: the cache scope of the caller's key; what it stores is its own.
    """

    request_id: str
    owner: str


class Answer:
    """One response on its way. `builder` tells how far it is."""

    def __init__(
        self,
        answering: Answering,
        request: ResponsesRequest,
        chat: ChatRequest,
        target: Target,
        caller: Caller,
        history: list[Item],
        inputs: list[Item],
    ) -> None:
        self._answering = answering
        self._fits = request.fits
        self._chat = chat
        self._target = target
        self.caller = caller
        self.inputs = inputs
        self.response_id = new_id("resp")
        self.is_stored = answering.store.is_on and request.store is not False
        self.builder = ResponseBuilder(
            new_response(
                response_id=self.response_id,
                created_unix_s=int(time.time()),
                model=target.name,
                status="queued" if request.background else "in_progress",
                store=self.is_stored,
                echo=request.echo,
            ),
            request.tools,
            wants_logprobs=request.wants_logprobs,
            as_summary=request.wants_summary,
            with_seal=request.wants_sealed,
            max_tool_calls=request.echo["max_tool_calls"],
        )
        self._remote = self._remote_turns(request, history) if request.tools.mcp else None

    def _remote_turns(self, request: ResponsesRequest, history: list[Item]) -> RemoteTurns:
        return RemoteTurns(
            request,
            self._chat.generate,
            self.builder,
            self._answering.mcp,
            self.caller.owner,
            history,
            self.inputs,
            self._target.route.info.max_context_tokens,
            self._count,
        )

    async def events(self) -> AsyncGenerator[Event | Loading, None]:
        """Yield the response's events as they come; the last one ends it. Closing the generator cancels the worker.

        Raises:
            HostlerError: instead of an end; `builder.fail` makes one of it.
        """
        try:
            if self._remote is not None:
                for made in self.builder.open():
                    yield made
                async with aclosing(self._remote.begin()) as opening:
                    async for made in opening:
                        yield made
            await self._complete_prompt()
            while True:
                async with aclosing(self._turn()) as turn:
                    async for event in turn:
                        yield event
                if self._remote is None or not self.builder.due:
                    return
                async with aclosing(self._remote.go_on()) as going_on:
                    async for made in going_on:
                        yield made
                if self.builder.is_over:
                    return
        except HostlerError as error:
            raise in_this_dialect(error) from error.__cause__

    async def _turn(self) -> AsyncGenerator[Event | Loading, None]:
        """Have the model generate once. The events end the response, unless calls are due."""
        generation = self._answering.dispatcher.generate(
            self._target, self._chat.generate, self.caller.request_id, cache_scope=self.caller.owner
        )
        async with aclosing(generation) as events:
            async for event in events:
                if isinstance(event, Loading):
                    yield event
                elif event.WhichOneof("event") != "progress":
                    for made in (*self.builder.open(), *self.builder.add(event)):
                        yield made

    async def kept_events(self) -> AsyncGenerator[Event | Loading, None]:
        """The same, for a client that waits: what is to be stored is stored before the last event says so."""
        async with aclosing(self.events()) as events:
            async for event in events:
                if not isinstance(event, Loading) and event["type"] in ENDINGS and self.is_stored:
                    event["response"] = await self._keep(event["response"])
                yield event

    async def _keep(self, response: dict[str, Any]) -> dict[str, Any]:
        store = self._answering.store
        try:
            await store.run(Database.insert, self.caller.owner, response, self.inputs)
        except Exception as exception:
            # The answer is good, only it cannot be fetched again; the log says why.
            as_hostler_error(exception, request_id=self.caller.request_id)
            return {**response, "store": False}
        return response

    async def _complete_prompt(self) -> None:
        """Fetch images given by address, and leave out what does not fit."""
        generate = self._chat.generate
        if self._chat.links:
            await self._answering.linked_images.fill(generate.chat.messages, self._chat.links)
        max_tokens = generate.max_tokens if generate.HasField("max_tokens") else None
        if self._fits and not surely_fits(generate.chat, max_tokens, self._target.route.info.max_context_tokens):
            await fit(generate.chat, max_tokens, self._count)

    async def _count(self, chat: pb.Chat) -> tuple[int, int]:
        return await self._answering.count(self._target, chat, self.caller)

    async def num_input_tokens(self) -> int:
        """Return the tokens of the prompt, without answering it; tools of MCP servers are part of it."""
        if self._remote is not None:
            async with aclosing(self._remote.offer()) as listing:
                async for _ in listing:
                    pass
        await self._complete_prompt()
        num_tokens, _ = await self._count(self._chat.generate.chat)
        return num_tokens


@dataclass(frozen=True, slots=True)
class Answering:
    """What it takes to answer. One for each process.

    Attributes:
        first_table_s: longest wait, while the server starts, for the first route table.
    """

    table: RouteTable
    dispatcher: Dispatcher
    linked_images: LinkedImages
    store: ResponseStore
    mcp: McpServers
    first_table_s: float

    async def prepare(self, request: ResponsesRequest, caller: Caller) -> Answer:
        """Find the model and the turns before this one, and check what can be checked.

        Raises:
            HostlerError: the request is refused.
        """
        routes = await self.table.first(self.first_table_s)
        target = find_chat_model(routes, request.model)
        if request.background and not self.store.is_on:
            raise InvalidRequest("'background' is off: this server stores nothing.", param="background")
        if request.tools.mcp:
            await self.mcp.load()
        history = await self._history(request, caller.owner)
        own = await self._own_items(request, history, caller.owner)
        chat = request.with_items(history, own)
        if target.route.HasField("info"):
            # What does not fit will be left out, so its length is no reason to refuse.
            checked = replace(chat, num_text_bytes=0) if request.fits else chat
            try:
                check_capabilities(checked, target.route.info)
            except ContextLengthExceeded as error:
                raise in_this_dialect(error) from None
            if request.tools.mcp and not target.route.info.supports_tools:
                raise UnsupportedParameter(
                    f"The model {show(request.model)} cannot call tools, those of MCP servers included.",
                    param=request.tools.mcp[0].where,
                )
        return Answer(self, request, chat, target, caller, history, own)

    async def count(self, target: Target, chat: pb.Chat, caller: Caller) -> tuple[int, int]:
        """Return a chat's tokens, and those of the model's context."""
        wanted = pb.TokenizeRequest(chat=chat)
        counted = await self.dispatcher.ask(target, lambda stub: stub.Tokenize, wanted, caller.request_id)
        return len(counted.ids), counted.max_context_tokens

    async def _history(self, request: ResponsesRequest, owner: str) -> list[Item]:
        if request.previous_response_id:
            return await self.store.run(Database.history, owner, request.previous_response_id)
        if request.conversation_id:
            return await self.store.run(Database.conversation_items, owner, request.conversation_id)
        return []

    async def _own_items(self, request: ResponsesRequest, history: list[Item], owner: str) -> list[Item]:
        """Return this turn's items with what they refer to in place of each reference."""
        wanted = [item["id"] for item in request.items if item["type"] == "item_reference"]
        if not wanted:
            return list(request.items)
        known = {item["id"]: item for item in history}
        found = await self.store.run(Database.find_items, owner, [each for each in wanted if each not in known])
        own: list[Item] = []
        for item in request.items:
            if item["type"] != "item_reference":
                own.append(item)
            elif item["id"] in found:
                own.append(found[item["id"]])
            elif item["id"] not in known:
                raise NotStored("item", item["id"])
        return own
