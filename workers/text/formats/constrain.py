"""Grammars, as text, that hold a reply to a format: structured answers, calls that must be made, calls that must be
right once begun. Pure; above: `reply.py`; below: the tables and llguidance's Lark dialect.

A reply that must be right from its first token may still think first: its grammar begins with the thoughts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workers.text.formats.pieces import Tool
from workers.text.formats.reasoning import ReasoningFormat
from workers.text.formats.table import ToolFormat
from workers.text.formats.tagged_call import is_text
from workers.text.schemas import for_grammar

MAX_CALLS = 16
_LONGEST_COUNTED_TEXT = 4096
_TEXT = "/(.|\\n)*/"


@dataclass(frozen=True, slots=True)
class Thoughts:
    """What may come before the constrained part.

    Attributes:
        opened: the prompt has opened the thoughts.
    """

    format: ReasoningFormat
    opened: bool


class GrammarText:
    """Writes grammars for one vocabulary.

    Args:
        controls: spelling → id of tokens that a grammar must name by id, since their spelling is not text to it.
    """

    def __init__(self, controls: Mapping[str, int]) -> None:
        self._controls = controls
        spellings = sorted(controls, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(re.escape(s) for s in spellings) + ")") if spellings else None
        self._rules: list[str] = []

    def _fresh(self) -> GrammarText:
        return GrammarText(self._controls)

    def structured(self, answer: str, thoughts: Thoughts | None, harmony: bool = False) -> str:
        """Return the grammar of a reply that is `answer` (a Lark expression, or the grammar `user`)."""
        own = self._fresh()
        if harmony:
            start = f"{own._analysis()} {own._literal('<|channel|>final<|message|>')} {answer}"
        else:
            start = f"{own._thoughts(thoughts)} {answer}"
        return own._grammar(start)

    def calls(self, format: ToolFormat, tools: Sequence[Tool], thoughts: Thoughts | None, *, parallel: bool) -> str:
        """Return the grammar of a reply that calls at least one of `tools`.

        Args:
            parallel: several calls may follow one another.
        """
        own = self._fresh()
        before = own._analysis() if format.harmony else own._thoughts(thoughts)
        return own._grammar(f"{before} {own._calls(format, tools, parallel, cut='')}")

    def free_or_calls(
        self,
        format: ToolFormat,
        tools: Sequence[Tool],
        thoughts: Thoughts | None,
        *,
        parallel: bool,
        answer: str | None = None,
    ) -> str:
        """Return the grammar of a reply that is free text, but whose calls are right once they begin.

        Args:
            answer: what the text must be when there is no call; None: anything.
        """
        own = self._fresh()
        if format.harmony:
            call = own._calls(format, tools, parallel, cut="")
            text = answer or _TEXT
            return own._grammar(f"{own._analysis()} ({call} | {own._literal('<|channel|>final<|message|>')} {text})")
        before = own._thoughts(thoughts)
        trigger = format.text.trigger
        if answer is not None:
            return own._grammar(f"{before} ({own._calls(format, tools, parallel, cut='')} | {answer})")
        if trigger is None:
            opening = format.text.outer_begin[:1] or "{"
            own._rules.append(f"PLAIN: /[^\\s{re.escape(opening)}](.|\\n)*/")
            return own._grammar(f"{before} ({own._calls(format, tools, parallel, cut='')} | PLAIN)?")
        rest = own._calls(format, tools, parallel, cut=trigger)
        if trigger in self._controls:
            head = f"TEXT <[{self._controls[trigger]}]>"
        else:
            own._rules.append(f"head[lazy]: TEXT {_quoted(trigger)}")
            head = "head"
        return own._grammar(f"{before} (TEXT | {head} {rest})")

    def _grammar(self, start: str) -> str:
        return "\n".join([f"start: {start}", f"TEXT: {_TEXT}", "GAP: /[ \\n]{0,8}/", *self._rules]) + "\n"

    def _thoughts(self, thoughts: Thoughts | None) -> str:
        if thoughts is None:
            return ""
        close = thoughts.format.close
        if close in self._controls:
            rest = f"TEXT <[{self._controls[close]}]> GAP"
        else:
            self._rules.append(f"thoughts[lazy]: TEXT {_quoted(close)}")
            rest = "thoughts GAP"
        return rest if thoughts.opened else f"({self._literal(thoughts.format.open)} {rest})?"

    def _analysis(self) -> str:
        opening = self._literal("<|channel|>analysis<|message|>")
        return f"({opening} TEXT {self._literal('<|end|><|start|>assistant')})?"

    def _literal(self, text: str) -> str:
        parts = self._split.split(text) if self._split else [text]
        items = [f"<[{self._controls[p]}]>" if p in self._controls else _quoted(p) for p in parts if p]
        return " ".join(items)

    def _calls(self, format: ToolFormat, tools: Sequence[Tool], parallel: bool, *, cut: str) -> str:
        """Return the expression of the calls; without the leading `cut`, which was matched already."""
        text = format.text
        repeats = parallel and text.repeats
        first = self._rule(" | ".join(self._call(format, t, cut="" if text.outer_begin else cut) for t in tools))
        expression = first
        if repeats:
            again = (
                first
                if text.outer_begin or not cut
                else self._rule(" | ".join(self._call(format, t, cut="") for t in tools))
            )
            between = self._literal(text.between)
            expression += f" ({between} {again}){{0,{MAX_CALLS - 1}}}"
        outer = text.outer_begin[len(cut) :] if text.outer_begin else ""
        return f"{self._literal(outer)} {expression} {self._literal(text.outer_end)}".strip()

    def _call(self, format: ToolFormat, tool: Tool, *, cut: str) -> str:
        text = format.text
        name = json.dumps(tool.name, ensure_ascii=False)[1:-1]
        begin = text.begin.format(name=name)[len(cut) :]
        schema = closed(tool.schema)
        lenient = not tool.strict
        if text.arguments == "json":
            arguments = _json(schema, lenient)
        elif text.arguments == "tagged":
            arguments = self._tagged(schema, lenient, "<parameter={key}>\n", "\n</parameter>\n")
        elif text.arguments == "keyed":
            arguments = self._tagged(schema, lenient, "<arg_key>{key}</arg_key>\n<arg_value>", "</arg_value>\n")
        else:
            arguments = self._pythonic(schema, lenient)
        return f"({self._literal(begin)} {arguments} {self._literal(text.end.format())})"

    def _rule(self, body: str) -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def _tagged(self, schema: Mapping[str, Any], lenient: bool, begin: str, end: str) -> str:
        items = []
        for key, value, required in _properties(schema):
            text = is_text(value)
            body = self._tagged_text(value, end) if text else f"{_json(value, lenient)} {self._literal(end)}"
            item = f"({self._literal(begin.format(key=key))} {body})"
            items.append(item if required else item + "?")
        return " ".join(items)

    def _tagged_text(self, schema: Mapping[str, Any], end: str) -> str:
        closing = self._literal(end)
        options = schema.get("enum") or ([schema["const"]] if "const" in schema else None)
        if options:
            return "(" + " | ".join(_quoted(str(option)) for option in options) + f") {closing}"
        low, high = schema.get("minLength", 0), schema.get("maxLength", _LONGEST_COUNTED_TEXT + 1)
        count = f"{{{low},{high}}}" if high <= _LONGEST_COUNTED_TEXT else f"{{{low},}}" if low else "*"
        if any(control in end for control in self._controls):
            return f"/(.|\\n){count}/ {closing}"
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}[lazy]: /(.|\\n){count}/ {_quoted(end)}")
        return name

    def _pythonic(self, schema: Mapping[str, Any], lenient: bool) -> str:
        required: list[str] = []
        optional: list[str] = []
        for key, value, is_required in _properties(schema):
            kind = value.get("type")
            if kind == "boolean":
                body = '("True" | "False")'
            elif kind == "null":
                body = '"None"'
            else:
                body = _json(value, lenient)
            (required if is_required else optional).append(f"({_quoted(key + '=')} {body})")
        tail = "".join(f' (", " {item})?' for item in optional)
        if required:
            return ' ", " '.join(required) + tail
        starts = [
            item + "".join(f' (", " {later})?' for later in optional[at + 1 :]) for at, item in enumerate(optional)
        ]
        return "(" + " | ".join(f"({start})" for start in starts) + ")?" if starts else ""


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema of arguments: an object, and where nothing is said of further properties, without any."""
    result = {**schema, "type": "object"}
    result.setdefault("properties", {})
    result.setdefault("additionalProperties", False)
    return result


def _properties(schema: Mapping[str, Any]) -> list[tuple[str, dict[str, Any], bool]]:
    """Return (key, schema that resolves by itself, required) of each property, in order."""
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    required = schema.get("required") or ()
    return [
        (key, {**(value if isinstance(value, dict) else {}), **shared}, key in required)
        for key, value in schema["properties"].items()
    ]


def _json(schema: Mapping[str, Any], lenient: bool) -> str:
    return "%json " + for_grammar(dict(schema), compact=True, lenient=lenient)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
