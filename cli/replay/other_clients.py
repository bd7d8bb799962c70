"""Clients that speak responses or messages, and Cursor, which mixes them. As seen in 2026-11. Above: `corpus`."""

from __future__ import annotations

from typing import Any

from cli.replay.chat_clients import MODELS, QUESTION, sdk
from cli.replay.exchange import Exchange
from cli.replay.prompts import anthropic_tools, chat_tools, flat_tools, rules, schema

_RESPONSES = "/v1/responses"


def _text(role: str, text: str) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]}


def codex() -> tuple[Exchange, ...]:
    """Codex: 40 KB; function, custom, namespace and hosted tools; developer messages; nothing stored."""
    tools = [
        *flat_tools(7, 6000),
        {"type": "custom", "name": "apply_patch", "description": rules(600, "Takes a patch as plain text.")},
        {
            "type": "namespace",
            "name": "mcp__notes",
            "description": "Tools of the notes server.",
            "tools": flat_tools(5, 8000),
        },
        {"type": "web_search", "external_web_access": False},
    ]
    agent = {
        "tools": tools,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "01a2-codex",
        "client_metadata": {"x-codex-turn-metadata": "{}"},
    }
    opening = [
        _text("developer", rules(17_000)),
        _text("developer", rules(2600, "Skills are files with further instructions.")),
        _text("user", "<environment_context>\n  <cwd>/home/me/project</cwd>\n</environment_context>"),
    ]
    called = [
        {"type": "reasoning", "summary": [], "encrypted_content": None},
        {"type": "function_call", "name": "read_file", "call_id": "call_1", "arguments": '{"path": "README.md"}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "# hostler\n"},
        {
            "type": "function_call",
            "name": "search",
            "namespace": "mcp__notes",
            "call_id": "call_2",
            "arguments": '{"pattern": "todo"}',
        },
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "nothing"}]},
        {
            "type": "custom_tool_call",
            "name": "apply_patch",
            "call_id": "call_3",
            "input": "*** Begin Patch\n*** End Patch",
        },
        {"type": "custom_tool_call_output", "call_id": "call_3", "output": "done"},
    ]
    headers = {"Accept": "text/event-stream", "Originator": "codex_exec", "Session-Id": "01a2"}
    return (
        Exchange(
            "asks with its tools",
            "responses stream",
            path=_RESPONSES,
            body={**agent, "input": [*opening, _text("user", QUESTION)]},
            headers=headers,
        ),
        Exchange(
            "sends the results of three kinds of calls",
            "responses stream",
            path=_RESPONSES,
            body={**agent, "input": [*opening, _text("user", "Read README.md."), *called]},
            headers=headers,
        ),
    )


def claude_code() -> tuple[Exchange, ...]:
    """Claude Code: HEAD /, then 90 KB with 25 tools without a type, a system message among the others, betas."""
    headers = {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
        "x-app": "cli",
    }
    agent = {
        "system": [{"type": "text", "text": rules(6000), "cache_control": {"type": "ephemeral"}}],
        "tools": anthropic_tools(25, 62_000),
        "metadata": {"user_id": '{"device_id": "0"}'},
        "max_tokens": 32_000,
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "stream": True,
    }
    first = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "<system-reminder>\nToday is Sunday.\n</system-reminder>"}],
        },
        {"role": "system", "content": rules(6000, "Kinds of agents that can be started:")},
        {"role": "user", "content": [{"type": "text", "text": QUESTION, "cache_control": {"type": "ephemeral"}}]},
    ]
    called = [
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I read it.", "signature": ""},
                {"type": "tool_use", "id": "toolu_1", "name": "read_file", "input": {"path": "README.md"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "# hostler"}]}
            ],
        },
    ]
    path = "/v1/messages?beta=true"
    counted = {"messages": [{"role": "user", "content": QUESTION}], "tools": anthropic_tools(25, 62_000)}
    return (
        Exchange("looks whether anybody is there", "anything", "HEAD", "/", sends_key="no"),
        Exchange(
            "asks with its tools", "messages stream", path=path, body={**agent, "messages": first}, headers=headers
        ),
        Exchange(
            "sends a tool's result",
            "messages stream",
            path=path,
            body={**agent, "messages": [*first, *called]},
            headers=headers,
        ),
        Exchange(
            "counts tokens", "token count", path="/v1/messages/count_tokens?beta=true", body=counted, headers=headers
        ),
    )


def cursor() -> tuple[Exchange, ...]:
    """Cursor: verifies by OPTIONS and a plain chat; its agent posts responses' bodies to chat and mixes in blocks."""
    path = "/v1/chat/completions"
    flat = {
        "input": [
            {"role": "system", "content": rules(9000)},
            {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
        ],
        "tools": [*flat_tools(12, 12_000), {"type": "custom", "name": "apply_patch", "description": "Takes a patch."}],
        "tool_choice": "auto",
        "store": False,
        "stream": True,
        "stream_options": {"include_usage": True},
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"effort": "medium", "summary": "auto"},
        "text": {"verbosity": "low"},
        "truncation": "disabled",
        "user": "u1",
    }
    blocks = {
        "messages": [
            {"role": "system", "content": rules(9000)},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Read README.md.", "cache_control": {"type": "ephemeral"}}],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "I read it."},
                    {"type": "tool_use", "id": "toolu_1", "name": "read_file", "input": {"path": "README.md"}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "# hostler"}]},
        ],
        "tools": [{"name": "read_file", "description": "Reads a file.", "input_schema": schema(path="string")}],
        "stream": True,
    }
    verify = {"messages": [{"role": "user", "content": "Test prompt using hostler"}], "max_tokens": 10, "stream": False}
    plain = {"messages": [{"role": "user", "content": QUESTION}], "tools": chat_tools(6, 3000), "stream": True}
    return (
        Exchange("looks whether the path is there", "anything", "OPTIONS", path, sends_key="no"),
        MODELS,
        Exchange("verifies the key", "chat", path=path, body=verify),
        Exchange("asks with its tools", "chat stream", path=path, body=plain),
        Exchange("agent: responses' body on the chat path", "chat stream", path=path, body=flat),
        Exchange("agent: Anthropic's blocks on the chat path", "chat stream", path=path, body=blocks),
    )


def sdk_with_responses() -> tuple[Exchange, ...]:
    """OpenAI's SDKs, both APIs."""
    return (
        *sdk(),
        Exchange("asks for a response", "responses", path=_RESPONSES, body={"input": QUESTION}),
        Exchange("streams a response", "responses stream", path=_RESPONSES, body={"input": QUESTION, "stream": True}),
    )
