"""The table of tool-call formats: how each model family writes calls, how it is known, how its grammar is spelled.

Above: `reply.py`. Below: the parsers. A new family is a new row.
"""

from __future__ import annotations

import re
import secrets
import string
from dataclasses import dataclass, field

from workers.text.formats import harmony
from workers.text.formats.json_call import HeaderCall, JsonCall
from workers.text.formats.parser import CallSyntax, Opener
from workers.text.formats.pythonic_call import PythonicCalls
from workers.text.formats.tagged_call import TaggedCall, Tags

_ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class CallText:
    """How calls are spelled when decoding is constrained; `{name}` stands for the tool's name.

    Attributes:
        arguments: notation of what stands between `begin` and `end`: "json", "tagged", "keyed" or "pythonic".
        outer_begin: before the first call.
        outer_end: behind the last.
        trigger: the text from which on a free reply is a call; None: its first brace or bracket.
        repeats: several calls may follow one another.
    """

    begin: str
    end: str
    arguments: str = "json"
    outer_begin: str = ""
    between: str = ""
    outer_end: str = ""
    trigger: str | None = None
    repeats: bool = True


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One family's way to call tools.

    Attributes:
        detect: all of one of these groups stand in the chat template.
        markers: spellings that must reach the parser although they are control tokens.
        nine_character_ids: the template wants call ids of nine letters and digits.
        arguments_as_text: the template joins arguments as text, not as an object.
    """

    name: str
    detect: tuple[tuple[str, ...], ...]
    syntax: CallSyntax
    text: CallText
    markers: tuple[str, ...] = ()
    nine_character_ids: bool = False
    arguments_as_text: bool = False
    harmony: bool = field(default=False)

    def new_call_id(self) -> str:
        """Return a fresh id for a call."""
        if self.nine_character_ids:
            return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


def _json(marker: str, *closers: str) -> Opener:
    return Opener(marker, lambda tools, opener: JsonCall(tools, opener, closers))


def _header(marker: str, header: str, *closers: str) -> Opener:
    pattern = re.compile(header)
    return Opener(marker, lambda tools, opener: HeaderCall(tools, opener, closers, header=pattern))


def _tagged(marker: str, tags: Tags, *closers: str) -> Opener:
    return Opener(marker, lambda tools, opener: TaggedCall(tools, opener, closers, tags=tags))


def _pythonic(marker: str, end: str, *closers: str) -> Opener:
    return Opener(marker, lambda tools, opener: PythonicCalls(tools, opener, closers, end=end))


_QWEN_PARAMETER = re.compile(r"<parameter=(?P<key>[^>\n]+)>(?:\n|(?=[^\n]))")
_QWEN_TAGS = Tags(
    "<function=", re.compile(r"\s*<function=(?P<name>[^>\n]+)>"), _QWEN_PARAMETER, "</parameter>", "</function>"
)
_QWEN_BARE_TAGS = Tags("", re.compile(r"(?P<name>[^>\n]+)>"), _QWEN_PARAMETER, "</parameter>", "</function>")
_GLM_TAGS = Tags(
    "",
    re.compile(r"\s*(?P<name>[^\s<]+)\s*(?=<)"),
    re.compile(r"<arg_key>(?P<key>[^<]*)</arg_key>\s*<arg_value>"),
    "</arg_value>",
    "",
)
_HERMES_JSON = '{{"name": "{name}", "arguments": '

HARMONY = ToolFormat(
    "harmony",
    (("<|channel|>", "<|message|>"),),
    CallSyntax(()),
    CallText("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>", "", repeats=False),
    markers=harmony.MARKERS,
    harmony=True,
)

TOOL_FORMATS: tuple[ToolFormat, ...] = (
    HARMONY,
    ToolFormat(
        "qwen3-coder",
        (("<function=", "<parameter="),),
        CallSyntax(
            (_tagged("<tool_call>", _QWEN_TAGS, "</tool_call>"), _tagged("<function=", _QWEN_BARE_TAGS, "</tool_call>"))
        ),
        CallText(
            "<tool_call>\n<function={name}>\n",
            "</function>\n</tool_call>",
            "tagged",
            between="\n",
            trigger="<tool_call>",
        ),
        markers=("<tool_call>", "</tool_call>"),
    ),
    ToolFormat(
        "glm",
        (("<arg_key>",),),
        CallSyntax((_tagged("<tool_call>", _GLM_TAGS, "</tool_call>"),)),
        CallText("<tool_call>{name}\n", "</tool_call>", "keyed", between="\n", trigger="<tool_call>"),
        markers=("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    ToolFormat(
        "deepseek-v3.1",
        (("<｜tool▁call▁begin｜>' + tool['function']['name']",), ("<｜tool▁call▁begin｜>'+ tool['function']['name']",)),
        CallSyntax(
            (_header("<｜tool▁call▁begin｜>", r"\s*(?P<name>[^\s<]+)<｜tool▁sep｜>\s*", "<｜tool▁call▁end｜>"),),
            ignored=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        ),
        CallText(
            "<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            outer_begin="<｜tool▁calls▁begin｜>",
            outer_end="<｜tool▁calls▁end｜>",
            trigger="<｜tool▁calls▁begin｜>",
        ),
        markers=(
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁sep｜>",
        ),
        arguments_as_text=True,
    ),
    ToolFormat(
        "deepseek",
        (("<｜tool▁call▁begin｜>",),),
        CallSyntax(
            (
                _header(
                    "<｜tool▁call▁begin｜>",
                    r"\s*(?:function<｜tool▁sep｜>)?(?P<name>[^\s<`]+)(?:<｜tool▁sep｜>)?\s*(?:```(?:json)?)?\s*",
                    "```",
                    "<｜tool▁call▁end｜>",
                ),
            ),
            ignored=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        ),
        CallText(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n",
            "\n```<｜tool▁call▁end｜>",
            outer_begin="<｜tool▁calls▁begin｜>",
            between="\n",
            outer_end="<｜tool▁calls▁end｜>",
            trigger="<｜tool▁calls▁begin｜>",
        ),
        markers=(
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁sep｜>",
        ),
        arguments_as_text=True,
    ),
    ToolFormat(
        "mistral-args",
        (("[TOOL_CALLS]", "[ARGS]"),),
        CallSyntax(
            (_header("[TOOL_CALLS]", r"\s*(?P<name>[\w.\-]+)(?:\[CALL_ID\][A-Za-z0-9]+)?(?:\[ARGS\])?\s*"),),
        ),
        CallText("[TOOL_CALLS]{name}[ARGS]", "", trigger="[TOOL_CALLS]"),
        markers=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        nine_character_ids=True,
    ),
    ToolFormat(
        "mistral",
        (("[TOOL_CALLS]",),),
        CallSyntax((_json("[TOOL_CALLS]"),)),
        CallText(
            _HERMES_JSON,
            "}}",
            outer_begin="[TOOL_CALLS] [",
            between=", ",
            outer_end="]",
            trigger="[TOOL_CALLS]",
        ),
        markers=("[TOOL_CALLS]",),
        nine_character_ids=True,
    ),
    ToolFormat(
        "llama4",
        (("<|python_start|>",), ("<|header_start|>", "func_name1")),
        CallSyntax((_pythonic("<|python_start|>[", "]", "<|python_end|>"),), bare_list=True, bare_json=True),
        CallText("{name}(", ")", "pythonic", outer_begin="[", between=", ", outer_end="]"),
        markers=("<|python_start|>", "<|python_end|>"),
    ),
    ToolFormat(
        "tool-code",
        (("```tool_code",),),
        CallSyntax((_pythonic("```tool_code\n", "```"),), bare_json=True),
        CallText("```tool_code\n{name}(", ")\n```", "pythonic", trigger="```tool_code", repeats=False),
    ),
    ToolFormat(
        "smollm3",
        (("xml_tools", "<tool_call>"),),
        CallSyntax((_json("<tool_call>", "</tool_call>"), _pythonic("<code>", "</code>")), bare_json=True),
        CallText("<tool_call>\n" + _HERMES_JSON, "}}\n</tool_call>", between="\n", trigger="<tool_call>"),
        markers=("<tool_call>", "</tool_call>", "<code>", "</code>"),
    ),
    ToolFormat(
        "hermes",
        (("<tool_call>",),),
        CallSyntax((_json("<tool_call>", "</tool_call>"),), bare_json=True),
        CallText("<tool_call>\n" + _HERMES_JSON, "}}\n</tool_call>", between="\n", trigger="<tool_call>"),
        markers=("<tool_call>", "</tool_call>"),
    ),
    ToolFormat(
        "llama3",
        (("<|python_tag|>",), ("<|start_header_id|>", "tools")),
        CallSyntax(
            (
                _json("<|python_tag|>"),
                _header("<function=", r"\s*(?P<name>[^>\s]+)>\s*", "</function>"),
            ),
            bare_json=True,
            bare_list=True,
        ),
        CallText('{{"name": "{name}", "parameters": ', "}}", repeats=False),
        markers=("<|python_tag|>",),
    ),
    # What nobody described: the reply is one JSON object, which most models understand from the prompt alone.
    ToolFormat(
        "json",
        ((),),
        CallSyntax((_json("<tool_call>", "</tool_call>"),), bare_json=True),
        CallText(_HERMES_JSON, "}}", repeats=False),
    ),
)

_USES_TOOLS = re.compile(r"\btools\b")


def detect_tool_format(template: str) -> ToolFormat | None:
    """Return the format that a chat template speaks of; None when the template shows no tools to the model."""
    if not _USES_TOOLS.search(template):
        return None
    return next(f for f in TOOL_FORMATS if any(all(text in template for text in group) for group in f.detect))


def tool_format(name: str) -> ToolFormat:
    """Return a format by name.

    Raises:
        KeyError: there is none.
    """
    return {f.name: f for f in TOOL_FORMATS}[name]
