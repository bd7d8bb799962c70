"""Client → what it sends. Pure data, filled with a model. Above: `cli.doctor_client`, tests; below: the corpora."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cli.replay import chat_clients, other_clients
from cli.replay.exchange import Exchange

# Enough to see a reply's whole shape; agents ask for thousands, which a small machine would write for minutes.
MAX_REPLY_TOKENS = 32
_LIMITS = {"/v1/responses": "max_output_tokens"}
_UNLIMITED = ("/load_model", "/v1/messages/count_tokens")

_REPLAYS: dict[str, Callable[[], tuple[Exchange, ...]]] = {
    "jan": chat_clients.jan,
    "open-webui": chat_clients.open_webui,
    "cursor": other_clients.cursor,
    "zed": chat_clients.zed,
    "codex": other_clients.codex,
    "claude-code": other_clients.claude_code,
    "opencode": chat_clients.opencode,
    "aider": chat_clients.aider,
    "cline": chat_clients.cline,
    "tiny-agents": chat_clients.tiny_agents,
    "llm": chat_clients.llm,
    "continue": chat_clients.continue_,
    "curl": chat_clients.curl,
    "openai-python": other_clients.sdk_with_responses,
    "openai-node": other_clients.sdk_with_responses,
    "ai-sdk": chat_clients.sdk,
    "langchain": chat_clients.sdk,
    "pydantic-ai": chat_clients.sdk,
    "huggingface-hub": chat_clients.sdk,
    "transformers": chat_clients.transformers,
}


def names() -> list[str]:
    """Return every client that has a replay."""
    return list(_REPLAYS)


def replay_of(client: str, model: str) -> list[Exchange]:
    """Return what a client sends to a model, in order; replies are cut after `MAX_REPLY_TOKENS`.

    Raises:
        KeyError: no such client.
    """
    return [_filled(exchange, model) for exchange in _REPLAYS[client]()]


def _filled(exchange: Exchange, model: str) -> Exchange:
    if exchange.body is None:
        return exchange
    path = exchange.path.partition("?")[0]
    body = {"model": model, **exchange.body}
    if path not in _UNLIMITED and "generation_config" not in body:
        limit = "max_completion_tokens" if "max_completion_tokens" in body else _LIMITS.get(path, "max_tokens")
        body[limit] = min(MAX_REPLY_TOKENS, body.get(limit, MAX_REPLY_TOKENS))
    return replace(exchange, body=body)
