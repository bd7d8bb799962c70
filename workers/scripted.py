"""An engine without a model: every byte of a reply is a function of prompt, seed and request id.

It serves development, fault tests and gateway benchmarks: whoever knows the request can say what the reply
must be (`expected_reply`), so a lost, doubled or crossed piece shows. Directives in the last user message
change its manners, each `[[name=value]]`:

    tokens=N      length of the reply in tokens (default 16, or max_tokens)
    delay_ms=N    pause before each token
    prefill_ms=N  pause before the first
    fail_at=N     fail with `internal_error` at token N
    die_at=N      end the process at token N
    hang_at=N     stop making steps at token N, for ever

It calls tools when it is told to, by `[[call NAME {"argument": "value"}]]`, one in each turn and in their order; then
it says the results back, joined by " | ". `$` within the arguments stands for the result before.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from collections.abc import AsyncIterator, Callable, Collection, Sequence

from hostler.errors import ContextLengthExceeded, InvalidRequest, Overloaded, UnsupportedParameter
from hostler.errors import Internal as InternalError

from workers.engine import (
    ChatPrompt,
    EngineStats,
    Event,
    Finish,
    GenerationRequest,
    LoadSpec,
    ModelFacts,
    Progress,
    Prompt,
    TextDelta,
    TextPrompt,
    TokenLogprob,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)

_WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "harbor", "iris", "juniper", "köln", "日本")
_DIRECTIVE = re.compile(r"\[\[(\w+)=(\d+)\]\]")
_CALL = re.compile(r"\[\[call ([\w.-]+) (\{.*?\})\]\]")
_CONTEXT_TOKENS = 32768


def prompt_text(prompt: Prompt) -> str:
    """Return the last user message of a chat, or the text itself."""
    if isinstance(prompt, ChatPrompt):
        users = [m.get("content") or "" for m in prompt.messages if m.get("role") == "user"]
        return str(users[-1]) if users else ""
    return prompt.text if isinstance(prompt, TextPrompt) else " ".join(map(str, prompt.ids))


def directives(text: str) -> dict[str, int]:
    """Return the directives in a prompt."""
    return {name: int(value) for name, value in _DIRECTIVE.findall(text)}


def results(prompt: Prompt) -> list[str]:
    """Return what tools have answered since the last user message."""
    found: list[str] = []
    for message in prompt.messages if isinstance(prompt, ChatPrompt) else ():
        if message.get("role") == "user":
            found.clear()
        elif message.get("role") == "tool":
            found.append(str(message.get("content") or ""))
    return found


def next_call(prompt: Prompt, may_call: Collection[str]) -> tuple[str, str] | None:
    """Return the tool and the arguments of the call that is due in this turn, or None.

    Args:
        may_call: names of the tools that may be called.
    """
    calls, answers = _CALL.findall(prompt_text(prompt)), results(prompt)
    if len(answers) >= len(calls):
        return None
    name, arguments = calls[len(answers)]
    before = json.dumps(answers[-1])[1:-1] if answers else ""
    return (name, arguments.replace("$", before)) if name in may_call else None


def token(text: str, seed: int, request_id: str, index: int) -> str:
    """Return token `index` of the reply: a word chosen by hash, and its index."""
    digest = hashlib.blake2b(f"{text}\0{seed}\0{request_id}\0{index}".encode(), digest_size=4).digest()
    return f"{_WORDS[digest[0] % len(_WORDS)]}{index} "


def expected_reply(text: str, seed: int, request_id: str, num_tokens: int) -> str:
    """Return the whole reply to a prompt."""
    return "".join(token(text, seed, request_id, i) for i in range(num_tokens))


class ScriptedEngine:
    """See the module. Runs in the asyncio loop; admits `max_running` at once, the rest wait in order."""

    def __init__(self, spec: LoadSpec) -> None:
        self._spec = spec
        self._slots = asyncio.Semaphore(spec.max_running)
        self._running = 0
        self._queued = 0
        self._steps = 0
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._hung = False
        self._changed: Callable[[], None] = lambda: None

    @property
    def facts(self) -> ModelFacts:
        """What it pretends to be."""
        return ModelFacts(self._spec.model, "scripted", "Scripted", "none", _CONTEXT_TOKENS, supports_tools=True)

    def stats(self) -> EngineStats:
        """Counters as of now; steps stand still after `hang_at`."""
        return EngineStats(
            num_steps=self._steps,
            num_running=self._running,
            num_queued=self._queued,
            max_running=self._spec.max_running,
            num_prompt_tokens_total=self._prompt_tokens,
            num_completion_tokens_total=self._completion_tokens,
        )

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback` whenever running or queued counts change."""
        self._changed = callback

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """Return one id for each word of the prompt."""
        return [len(word) for word in prompt_text(prompt).split()]

    async def detokenize(self, ids: Sequence[int]) -> str:
        """Return one word for each id."""
        return " ".join("x" * i for i in ids)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """Serve one request."""
        text = prompt_text(request.prompt)
        if not text:
            raise InvalidRequest("The prompt is empty: there is nothing to continue.", param="messages")
        prompt_tokens = len(text.split())
        if prompt_tokens >= _CONTEXT_TOKENS:
            raise ContextLengthExceeded(
                f"This prompt has {prompt_tokens} tokens; the model takes {_CONTEXT_TOKENS}.", param="messages"
            ).counted(prompt_tokens, _CONTEXT_TOKENS)
        if self._running >= self._spec.max_running and self._queued >= self._spec.max_queued:
            raise Overloaded(f"{self._running + self._queued} requests are already running or queued. Try again later.")
        self._queued += 1
        self._changed()
        try:
            await self._slots.acquire()
        finally:
            self._queued -= 1
        self._running += 1
        self._prompt_tokens += prompt_tokens
        self._changed()
        try:
            async for event in self._reply(request, text, prompt_tokens):
                yield event
        finally:
            self._running -= 1
            self._slots.release()
            self._changed()

    async def _reply(self, request: GenerationRequest, text: str, prompt_tokens: int) -> AsyncIterator[Event]:
        orders = directives(text)
        seed = request.sampling.seed or 0
        wanted = orders.get("tokens", 16 if request.max_tokens is None else request.max_tokens)
        room = _CONTEXT_TOKENS - prompt_tokens
        limit = min(wanted, room if request.max_tokens is None else min(room, request.max_tokens))
        if request.wants_progress:
            yield Progress(prompt_tokens)
        await asyncio.sleep(orders.get("prefill_ms", 0) / 1000)
        answers, call = results(request.prompt), next_call(request.prompt, [t.name for t in request.tool_use.tools])
        if call is not None:
            name, arguments = call
            yield ToolCallStart(0, f"call_{len(answers)}", name)
            for piece in re.findall(r"\s*\S+", arguments):
                yield ToolCallArguments(0, piece)
            yield ToolCallEnd(0)
            yield Finish("tool_calls", prompt_tokens, 1)
            return
        if request.tool_use.required:
            raise UnsupportedParameter(
                "The scripted engine calls the tools that its prompt tells it to, and no other.", param="tool_choice"
            )
        if answers and _CALL.search(text):
            yield TextDelta(" | ".join(answers))
            yield Finish("stop", prompt_tokens, len(answers))
            return
        sent, stop = "", ""
        count = 0
        while count < limit and not stop:
            if orders.get("fail_at") == count:
                raise InternalError("The script said to fail here.")
            if orders.get("die_at") == count:
                os._exit(13)
            if orders.get("hang_at") == count:
                self._hung = True
            if self._hung:
                await asyncio.Event().wait()
            # A real suspension at every token, so that a cancelled call ends here and not at the end.
            await asyncio.sleep(orders.get("delay_ms", 0) / 1000)
            piece = token(text, seed, request.request_id, count)
            stop = next((s for s in request.stop if s in sent + piece), "")
            if stop:
                piece = (sent + piece)[: (sent + piece).index(stop)][len(sent) :]
            sent += piece
            self._steps += 1
            self._completion_tokens += 1
            scored: tuple[TokenLogprob, ...] = ()
            if request.top_logprobs is not None:
                one = TokenLogprob(count, piece.encode(), -0.5)
                scored = (TokenLogprob(count, piece.encode(), -0.5, (one,) * min(1, request.top_logprobs)),)
            count += 1
            yield TextDelta(piece, scored)
        yield Finish("stop" if stop or limit == wanted else "length", prompt_tokens, count, stop=stop)

    async def close(self) -> None:
        """Nothing to free."""
