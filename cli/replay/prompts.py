"""Prompts and tools of the length and shape that agents send; the words are ours. Above: the corpora."""

from __future__ import annotations

import itertools
from typing import Any

_RULES = (
    "Read a file before you change it.",
    "Change as little as the task needs, and say what you changed.",
    "Run the tests that cover what you touched; if they fail, say so.",
    "Never guess the content of a file that you have not seen.",
    "Prefer the tools you are given over describing what they would do.",
    "Ask only if the answer decides what you do next.",
    "Paths are relative to the directory that the session was started in.",
    "When the task is done, stop.",
)


def rules(num_chars: int, opening: str = "You are a coding agent in the user's terminal.") -> str:
    """Return instructions of about so many characters."""
    lines, length = [opening], len(opening)
    for number, rule in enumerate(itertools.cycle(_RULES), start=1):
        if length >= num_chars:
            break
        lines.append(f"{number}. {rule}")
        length += len(lines[-1]) + 1
    return "\n".join(lines)


def schema(**properties: Any) -> dict[str, Any]:
    """Return a JSON schema of an object; a property is given by its type or by a whole schema."""
    spelled = {name: kind if isinstance(kind, dict) else {"type": kind} for name, kind in properties.items()}
    return {"type": "object", "properties": spelled, "required": list(spelled)[:1], "additionalProperties": False}


_AGENT_TOOLS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("read_file", "Reads a text file and returns its lines with numbers.", schema(path="string", limit="integer")),
    (
        "run_command",
        "Runs a shell command and returns what it printed.",
        schema(command="string", timeout_ms={"type": "integer", "minimum": 1, "maximum": 600000}),
    ),
    (
        "edit_file",
        "Replaces an exact piece of text in a file.",
        schema(path="string", old_text="string", new_text="string", replace_all={"type": "boolean", "default": False}),
    ),
    (
        "search",
        "Finds lines that match a regular expression.",
        schema(pattern="string", paths={"type": "array", "items": {"type": "string"}}),
    ),
    (
        "plan",
        "Keeps the list of steps, with the state of each.",
        schema(
            steps={
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "title": {"type": "string"},
                        "state": {"type": "string", "enum": ["open", "doing", "done"]},
                    },
                    "required": ["title", "state"],
                },
            }
        ),
    ),
    (
        "ask",
        "Asks the user one question.",
        schema(
            question="string", choices={"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
        ),
    ),
)


def tools(number: int, num_chars: int) -> list[tuple[str, str, dict[str, Any]]]:
    """Return (name, description, schema) of so many tools, all descriptions together of about so many characters."""
    each = max(0, num_chars // number)
    found = []
    for index in range(number):
        name, description, parameters = _AGENT_TOOLS[index % len(_AGENT_TOOLS)]
        turn = index // len(_AGENT_TOOLS)
        found.append((f"{name}_{turn}" if turn else name, rules(each, description), parameters))
    return found


def chat_tools(number: int, num_chars: int) -> list[dict[str, Any]]:
    """Return tools as chat completions has them."""
    return [
        {"type": "function", "function": {"name": name, "description": text, "parameters": parameters}}
        for name, text, parameters in tools(number, num_chars)
    ]


def flat_tools(number: int, num_chars: int) -> list[dict[str, Any]]:
    """Return tools as responses has them."""
    return [
        {"type": "function", "name": name, "description": text, "strict": False, "parameters": parameters}
        for name, text, parameters in tools(number, num_chars)
    ]


def anthropic_tools(number: int, num_chars: int) -> list[dict[str, Any]]:
    """Return tools as messages has them: without a type."""
    return [
        {"name": name, "description": text, "input_schema": parameters}
        for name, text, parameters in tools(number, num_chars)
    ]


def call(call_id: str, path: str = "README.md") -> dict[str, Any]:
    """Return a call of `read_file` as chat completions has it."""
    return {"id": call_id, "type": "function", "function": {"name": "read_file", "arguments": f'{{"path": "{path}"}}'}}
