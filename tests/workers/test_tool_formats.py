"""Every family's calls, parsed from text cut at every position: the cuts never change what is found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.text.formats.harmony import HarmonyParser
from workers.text.formats.parser import CallParser
from workers.text.formats.pieces import Arguments, CallEnd, CallStart, Content, Piece, Thought, Tool
from workers.text.formats.reasoning import REASONING_FORMATS, ThoughtSplitter
from workers.text.formats.table import TOOL_FORMATS, detect_tool_format, tool_format
from workers.text.reply import MarkedParser, ReplyParser

WEATHER = Tool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "exact": {"type": "boolean"},
        },
    },
)
TOOLS = {"get_weather": WEATHER, "now": Tool("now"), "a.b-c": Tool("a.b-c")}
PARIS = {"city": "Paris", "days": 3}


@dataclass(frozen=True)
class Case:
    format: str
    text: str
    expected: Sequence[object]
    """Content as strings, thoughts as ("thought", text), calls as (name, arguments)."""


def parser_for(format_name: str) -> ReplyParser:
    if format_name == "harmony":
        return HarmonyParser(TOOLS)
    return MarkedParser(None, CallParser(tool_format(format_name).syntax, TOOLS))


def found(parser: ReplyParser, pieces: Sequence[str]) -> list[object]:
    """What a parser finds, with neighbours of one kind joined and arguments read."""
    events: list[Piece] = []
    for piece in pieces:
        events += parser.push(piece)
    events += parser.finish()
    out: list[object] = []
    name, arguments = None, ""
    for event in events:
        if isinstance(event, CallStart):
            assert name is None
            name, arguments = event.name, ""
        elif isinstance(event, Arguments):
            assert name is not None
            arguments += event.json
        elif isinstance(event, CallEnd):
            try:
                out.append((name, json.loads(arguments)))
            except ValueError:
                out.append((name, "broken: " + arguments))
            name = None
        elif isinstance(event, Content):
            out[-1:] = [out[-1] + event.text] if out and isinstance(out[-1], str) else [*out[-1:], event.text]
        elif isinstance(event, Thought):
            joins = out and isinstance(out[-1], tuple) and out[-1][0] == "thought"
            out[-1:] = [("thought", out[-1][1] + event.text)] if joins else [*out[-1:], ("thought", event.text)]  # type: ignore[index]
    if name is not None:
        out.append((name, "open: " + arguments))
    return out


CALL = ("get_weather", PARIS)
NOW = ("now", {})
HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>'
BARE = '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}'
QWEN = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)
GLM = (
    "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
)
DEEPSEEK = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"city": "Paris", "days": 3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n'
    "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)

CASES = [
    Case("hermes", HERMES, [CALL]),
    Case("hermes", "I will look.\n" + HERMES + "\n" + HERMES, ["I will look.", CALL, CALL]),
    Case("hermes", "No call: a < b, <tool, done. ", ["No call: a < b, <tool, done. "]),
    Case("hermes", HERMES.removesuffix("\n</tool_call>"), [CALL]),
    Case("hermes", HERMES + "\n\nThat was it.", [CALL, "\n\nThat was it."]),
    Case("hermes", '<tool_call>{"arguments": {"city": "Paris", "days": 3}, "name": "get_weather"}</tool_call>', [CALL]),
    Case("hermes", '<tool_call>{"name": "now"}</tool_call>', [NOW]),
    Case("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', [NOW]),
    Case("hermes", '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', [NOW]),
    Case("hermes", '<tool_call>{"type": "function", "function": {"name": "now", "arguments": {}}}</tool_call>', [NOW]),
    Case(
        "hermes",
        '<tool_call>{"name": "a.b-c", "arguments": {"x": "l1\nl2 \\"q\\" é"}}',
        [("a.b-c", {"x": 'l1\nl2 "q" é'})],
    ),
    Case("hermes", BARE, [CALL]),
    Case("hermes", "\n" + BARE + "\n" + BARE, [CALL, CALL]),
    Case("hermes", "```json\n" + BARE + "\n```", [CALL]),
    # Malformed output is never lost: it is content.
    Case(
        "hermes",
        '<tool_call>{"name": "stranger", "arguments": {}}</tool_call>',
        ['<tool_call>{"name": "stranger", "arguments": {}}</tool_call>'],
    ),
    Case("hermes", "<tool_call>no json</tool_call>", ["<tool_call>no json</tool_call>"]),
    Case("hermes", '<tool_call>{"name": "now"', [("now", "broken: ")]),
    Case("hermes", '<tool_call>{"nam', ['<tool_call>{"nam']),
    Case("hermes", '{"city": "Paris"}', ['{"city": "Paris"}']),
    Case("hermes", '{"name": "Ann", "age": 3}', ['{"name": "Ann", "age": 3}']),
    Case("hermes", "```python\nprint(1)\n```", ["```python\nprint(1)\n```"]),
    Case("hermes", '```json\n{"a": 1}\n``` and more', ['```json\n{"a": 1}\n``` and more']),
    Case("qwen3-coder", QWEN, [CALL]),
    Case("qwen3-coder", "Look:\n\n" + QWEN + "\n" + QWEN, ["Look:", CALL, CALL]),
    Case("qwen3-coder", QWEN.removeprefix("<tool_call>\n"), [CALL]),
    Case("qwen3-coder", "<tool_call>\n<function=now>\n</function>\n</tool_call>", [NOW]),
    Case(
        "qwen3-coder",
        '<tool_call>\n<function=get_weather>\n<parameter=city>\n\nline "1"\n</b>\n\n</parameter>\n'
        "<parameter=tags>\n['a', 'b']\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n</function>\n</tool_call>",
        [("get_weather", {"city": '\nline "1"\n</b>\n', "tags": ["a", "b"], "exact": True})],
    ),
    Case(
        "qwen3-coder", "<tool_call>\n<function=unknown>\n</function>", ["<tool_call>\n<function=unknown>\n</function>"]
    ),
    Case("qwen3-coder", "<tool_call>\nhello", ["<tool_call>\nhello"]),
    Case("glm", GLM, [CALL]),
    Case("glm", "Well.\n" + GLM + "\n" + GLM, ["Well.", CALL, CALL]),
    Case("glm", "<tool_call>now</tool_call>", [NOW]),
    Case("deepseek", DEEPSEEK, [CALL, NOW]),
    Case("deepseek", "Hm.\n" + DEEPSEEK, ["Hm.", CALL, NOW]),
    Case(
        "deepseek-v3.1",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
        '{"city": "Paris", "days": 3}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        [CALL],
    ),
    Case("mistral", f"[TOOL_CALLS] [{BARE}, {BARE}]", [CALL, CALL]),
    Case("mistral", f"[TOOL_CALLS][{BARE}]", [CALL]),
    Case("mistral", "See [TOOL] and [1].", ["See [TOOL] and [1]."]),
    Case("mistral-args", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 3}', [CALL]),
    Case("mistral-args", "[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}[TOOL_CALLS]now{}", [NOW, NOW]),
    Case("llama3", BARE.replace("arguments", "parameters"), [CALL]),
    Case("llama3", f"<|python_tag|>{BARE.replace('arguments', 'parameters')}", [CALL]),
    Case("llama3", '<function=get_weather>{"city": "Paris", "days": 3}</function>', [CALL]),
    Case("llama3", BARE + "; " + BARE, [CALL, CALL]),
    Case("llama3", '[get_weather(city="Paris", days=3)]', [CALL]),
    Case("llama4", "[get_weather(city='Paris', days=3), now()]", [CALL, NOW]),
    Case("llama4", '<|python_start|>[get_weather(city="Paris", days=3)]<|python_end|>', [CALL]),
    Case("llama4", "[1] is a reference", ["[1] is a reference"]),
    Case("llama4", "[get_weather is a tool]", ["[get_weather is a tool]"]),
    Case(
        "llama4",
        "[get_weather(city='O\\'Hare, (x)', tags=[\"a,b\", 'c'], exact=True, days=-2)]",
        [("get_weather", {"city": "O'Hare, (x)", "tags": ["a,b", "c"], "exact": True, "days": -2})],
    ),
    Case("tool-code", "```tool_code\nget_weather(city='Paris', days=3)\n```", [CALL]),
    Case("tool-code", "```tool_code\nprint(get_weather(city='Paris', days=3))\n```", [CALL]),
    Case("tool-code", "```json\n" + BARE.replace("arguments", "parameters") + "\n```", [CALL]),
    Case("smollm3", HERMES, [CALL]),
    Case("smollm3", "<code>\nget_weather(city='Paris', days=3)\n</code>", [CALL]),
    Case("json", BARE, [CALL]),
    Case(
        "harmony",
        "<|channel|>analysis<|message|>Need the weather.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris", "days": 3}',
        [("thought", "Need the weather."), CALL],
    ),
    Case(
        "harmony",
        "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>Hello < there.",
        [("thought", "Easy."), "Hello < there."],
    ),
    Case(
        "harmony",
        "<|channel|>commentary<|message|>First, look.<|end|><|start|>assistant to=functions.now<|channel|>commentary "
        "json<|message|>{}<|call|>",
        ["First, look.", NOW],
    ),
    Case("harmony", "<|channel|>commentary to=functions.stranger<|message|>{}<|call|>", ["{}"]),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.format}: {case.text[:30]!r}")
def test_a_reply_is_understood_wherever_it_is_cut(case: Case) -> None:
    assert found(parser_for(case.format), [case.text]) == case.expected
    assert found(parser_for(case.format), list(case.text)) == case.expected
    for at in range(1, len(case.text)):
        assert found(parser_for(case.format), [case.text[:at], case.text[at:]]) == case.expected, at


@given(case=st.sampled_from(CASES), cuts=st.lists(st.integers(0, 400), max_size=8))
def test_any_set_of_cuts_gives_the_same_events(case: Case, cuts: list[int]) -> None:
    edges = sorted({0, len(case.text), *(c for c in cuts if c < len(case.text))})
    assert found(parser_for(case.format), [case.text[a:b] for a, b in pairwise(edges)]) == case.expected


@given(
    format_name=st.sampled_from([f.name for f in TOOL_FORMATS]),
    text=st.lists(
        st.sampled_from(
            [
                "<tool_call>",
                "</tool_call>",
                "{",
                "}",
                '"name": "now"',
                '"arguments": {}',
                ", ",
                "now",
                "(",
                ")",
                "[",
                "]",
                "\n",
                "<function=now>",
                "</function>",
                "[TOOL_CALLS]",
                "[ARGS]",
                "```json\n",
                "```",
                "text",
                "x=1",
                "\\",
                '"',
                "<arg_key>",
                "</arg_key>",
                "<arg_value>",
                "</arg_value>",
                "<｜tool▁call▁begin｜>",
                "<|channel|>",
                "<|message|>",
            ]
        ),
        max_size=14,
    ).map("".join),
    cuts=st.lists(st.integers(0, 150), max_size=6),
)
def test_nonsense_breaks_nothing_and_cuts_never_matter(format_name: str, text: str, cuts: list[int]) -> None:
    whole = found(parser_for(format_name), [text])
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    assert found(parser_for(format_name), [text[a:b] for a, b in pairwise(edges)]) == whole
    if not any(isinstance(item, tuple) for item in whole) and not any(
        marker in text for f in TOOL_FORMATS for marker in (*f.syntax.ignored, *f.markers)
    ):
        assert "".join(map(str, whole)).strip() == text.strip()


def test_arguments_leave_while_they_are_written() -> None:
    parser = parser_for("hermes")
    assert parser.push('<tool_call>\n{"name": "get_weather", "arguments": {"ci') == [
        CallStart("get_weather"),
        Arguments('{"ci'),
    ]
    assert parser.push('ty": "Par') == [Arguments('ty": "Par')]


def test_tagged_text_leaves_while_it_is_written() -> None:
    parser = parser_for("qwen3-coder")
    parser.push("<tool_call>\n<function=get_weather>\n<parameter=city>\n")
    assert parser.push('Pa"r') == [Arguments('Pa\\"r')]


def test_content_is_held_back_only_while_it_may_begin_a_call() -> None:
    parser = parser_for("hermes")
    assert parser.push("2 <") == [Content("2")]
    assert parser.push(" 3") == [Content(" < 3")]


def test_a_thought_of_each_family_is_parted_from_the_answer() -> None:
    for marks in REASONING_FORMATS:
        text = f"{marks.open}Let me\nsee. {marks.close}\n\nIt is 4 <thin."
        expected = [("thought", "Let me\nsee."), "It is 4 <thin."]
        for at in range(len(text) + 1):
            splitter = ThoughtSplitter(marks, opened=False)
            assert found(MarkedParser(splitter, None), [text[:at], text[at:]]) == expected, (marks.name, at)
        opened = ThoughtSplitter(marks, opened=True)
        assert found(MarkedParser(opened, None), list(text.removeprefix(marks.open))) == expected


def test_calls_are_looked_for_only_behind_the_thoughts() -> None:
    parser = MarkedParser(
        ThoughtSplitter(REASONING_FORMATS[0], opened=True), CallParser(tool_format("hermes").syntax, TOOLS)
    )
    text = f"Perhaps {HERMES}?</think>\n\n{HERMES}"
    assert found(parser, list(text)) == [("thought", f"Perhaps {HERMES}?"), CALL]


def test_an_unclosed_thought_stays_a_thought() -> None:
    splitter = ThoughtSplitter(REASONING_FORMATS[0], opened=False)
    assert found(MarkedParser(splitter, None), list("<think>going on")) == [("thought", "going on")]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{% for t in tools %}<tools>{{ t }}{% endfor %}<tool_call>", "hermes"),
        ("{{ tools }}<tool_call><function=x><parameter=y>", "qwen3-coder"),
        ("{{ tools }}<tool_call>{{ name }}<arg_key>", "glm"),
        ("{{ tools }}[TOOL_CALLS]", "mistral"),
        ("{{ tools }}[TOOL_CALLS]{{ n }}[ARGS]", "mistral-args"),
        ("{{ tools }}<|start_header_id|><|python_tag|>", "llama3"),
        ("{{ tools }}<|header_start|>[func_name1(params_name1=1)]", "llama4"),
        ("{{ tools }}<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>", "deepseek"),
        ("{{ tools }}<|channel|>analysis<|message|>", "harmony"),
        ("{{ tools }} xml_tools <tool_call>", "smollm3"),
        ("{{ tools }} answer in JSON", "json"),
    ],
)
def test_the_format_is_known_by_the_template(template: str, name: str) -> None:
    detected = detect_tool_format(template)
    assert detected is not None
    assert detected.name == name


def test_a_template_without_tools_has_no_format() -> None:
    assert detect_tool_format("<|im_start|>{{ messages }}") is None
