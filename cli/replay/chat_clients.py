"""Clients that speak chat completions. Sizes, fields and headers as seen on the wire in 2026-11. Above: `corpus`."""

from __future__ import annotations

from typing import Any

from cli.replay.exchange import Exchange
from cli.replay.prompts import call, chat_tools, rules

QUESTION = "Say hello, then stop."
MODELS = Exchange("lists the models", "models", method="GET", path="/v1/models")
_USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def _user(text: str = QUESTION) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _system(num_chars: int) -> dict[str, Any]:
    return {"role": "system", "content": rules(num_chars)}


def _after_a_call(**answer: Any) -> list[dict[str, Any]]:
    calling = {"role": "assistant", "content": "", "tool_calls": [call("call_1")]}
    return [calling, {"role": "tool", "tool_call_id": "call_1", "content": "# hostler\n", **answer}]


def jan() -> tuple[Exchange, ...]:
    """Jan: a web view; both key headers, an Origin that no web page has, llama.cpp's sampling fields."""
    headers = {"Origin": "tauri://localhost", "Accept": "*/*"}
    body = {
        "messages": [{"role": "system", "content": "You are a helpful assistant."}, _user()],
        **_USAGE,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "repeat_penalty": 1.12,
    }
    return (
        Exchange("lists the models", "models", "GET", "/v1/models", headers=headers, sends_key="both"),
        Exchange("asks, streamed", "chat stream", body=body, headers=headers, sends_key="both"),
    )


def open_webui() -> tuple[Exchange, ...]:
    """Open WebUI: sampling fields beyond OpenAI's; a title for the chat, not streamed; looks for speech."""
    chat = {"messages": [_user()], **_USAGE, "top_k": 40, "min_p": 0.05, "user": "u1", "metadata": {"chat_id": "c1"}}
    title = {
        "messages": [_user("Give this chat a title, as JSON: hello")],
        "stream": False,
        "max_completion_tokens": 64,
    }
    return (
        MODELS,
        Exchange("asks, streamed", "chat stream", body=chat),
        Exchange("asks for a title", "chat", body=title),
        Exchange("looks for voices", "anything", "GET", "/v1/audio/voices", sends_key="no", is_optional=True),
        Exchange("looks for speech models", "anything", "GET", "/v1/audio/models", sends_key="no", is_optional=True),
    )


def opencode() -> tuple[Exchange, ...]:
    """opencode: a title first, then the agent with its tools; AI SDK's parser."""
    agent = {"max_tokens": 4096, "tools": chat_tools(11, 22_000), "tool_choice": "auto", **_USAGE}
    title = {"max_tokens": 4096, "messages": [_system(2200), _user("Give this a title:\n"), _user()], **_USAGE}
    return (
        Exchange("asks for a title", "chat stream", body=title),
        Exchange("asks with its tools", "chat stream", body={**agent, "messages": [_system(9000), _user()]}),
        Exchange(
            "sends a tool's result",
            "chat stream",
            body={**agent, "messages": [_system(9000), _user("Read README.md."), *_after_a_call()]},
        ),
    )


def cline() -> tuple[Exchange, ...]:
    """Cline: 25 tools, AI SDK's parser."""
    agent = {"tools": chat_tools(25, 14_000), "tool_choice": "auto", **_USAGE}
    return (
        Exchange("asks with its tools", "chat stream", body={**agent, "messages": [_system(4300), _user()]}),
        Exchange(
            "sends a tool's result",
            "chat stream",
            body={**agent, "messages": [_system(4300), _user("Read README.md."), *_after_a_call()]},
        ),
    )


def continue_() -> tuple[Exchange, ...]:
    """Continue: openai-node's parser; editing without tools; usage asked for."""
    agent = {"tools": chat_tools(9, 2800), **_USAGE}
    history = [{"role": "system", "content": rules(1300)}, _user("Read README.md."), *_after_a_call()]
    return (
        Exchange("asks with its tools", "chat stream", body={**agent, "messages": [_system(1300), _user()]}),
        Exchange("sends a tool's result", "chat stream", body={**agent, "messages": history}),
        Exchange(
            "edits a piece of code", "chat stream", body={"messages": [_user("Rename x to y: x = 1")], "stream": True}
        ),
    )


def aider() -> tuple[Exchange, ...]:
    """aider: through litellm; no tools, temperature 0, the same role twice in a row."""
    messages = [_system(6000), _user("I have added these files: none."), {"role": "assistant", "content": "Ok."}]
    body = {"messages": [*messages, _user(), _user("Answer in one line.")], "temperature": 0, "stream": True}
    return (
        Exchange("asks, streamed", "chat stream", body=body),
        Exchange("asks for a commit message", "chat", body={"messages": [_system(500), _user()], "temperature": 0}),
    )


def zed() -> tuple[Exchange, ...]:
    """Zed: content as parts, tools, no parallel calls."""
    agent = {**_USAGE, "temperature": 1.0, "tools": chat_tools(8, 6000), "parallel_tool_calls": False}
    parts = {"role": "user", "content": [{"type": "text", "text": QUESTION}]}
    return (
        Exchange("asks with its tools", "chat stream", body={**agent, "messages": [_system(3000), parts]}),
        Exchange(
            "sends a tool's result",
            "chat stream",
            body={**agent, "messages": [_system(3000), parts, *_after_a_call()]},
        ),
    )


def tiny_agents() -> tuple[Exchange, ...]:
    """tiny-agents: no usage asked for, and a chunk with usage alone crashes it; odd tool messages."""
    agent = {"stream": True, "tools": chat_tools(4, 800), "tool_choice": "auto"}
    answer = {"name": "read_file", "tool_calls": None, "content": ""}
    return (
        Exchange("asks with its tools", "chat stream", body={**agent, "messages": [_system(700), _user()]}),
        Exchange(
            "sends a tool's result",
            "chat stream",
            body={**agent, "messages": [_system(700), _user("Read README.md."), *_after_a_call(**answer)]},
        ),
    )


def transformers() -> tuple[Exchange, ...]:
    """`transformers chat`: has the model loaded first; generation settings as JSON in a string; sends no key."""
    settings = '{"max_new_tokens": 32, "do_sample": false, "transformers_version": "5.0.0"}'
    body = {"messages": [_user()], "stream": True, "request_id": "req_0", "generation_config": settings}
    return (
        Exchange("has the model loaded", "load progress", path="/load_model", body={}, sends_key="no"),
        Exchange("asks, streamed", "chat stream", body=body, sends_key="no"),
    )


def llm() -> tuple[Exchange, ...]:
    """llm: openai-python, streamed, with usage."""
    return (Exchange("asks, streamed", "chat stream", body={"messages": [_user()], **_USAGE}),)


def sdk() -> tuple[Exchange, ...]:
    """The chat half of OpenAI's SDKs, and the libraries on top of them."""
    weather = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
    return (
        MODELS,
        Exchange("asks", "chat", body={"messages": [_user()]}),
        Exchange("asks, streamed", "chat stream", body={"messages": [_user()], "stream": True}),
        Exchange("asks with a tool", "chat", body={"messages": [_user()], "tools": weather}, is_optional=True),
    )


def curl() -> tuple[Exchange, ...]:
    """curl: one question."""
    return (Exchange("asks", "chat", body={"messages": [_user()]}),)
