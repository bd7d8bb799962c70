"""What the reply to a request is made of: which parser, which grammar, which marks. Knows the model's formats.

Above: the engine asks for a `ReplyPlan` when a request comes. Below: the tables of `formats/`, the grammar compiler.
Thoughts come before anything structured: grammars begin with them, so a constrained reply may think first.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import llguidance
from hostler.errors import InvalidRequest, UnsupportedParameter
from transformers import PreTrainedTokenizerFast

from workers.engine import ChatPrompt, Constraint, GenerationRequest, ToolUse
from workers.text.detokenizer import Decode
from workers.text.formats.constrain import GrammarText, Thoughts
from workers.text.formats.harmony import HarmonyParser
from workers.text.formats.parser import CallParser
from workers.text.formats.pieces import Tool
from workers.text.formats.reasoning import ThoughtSplitter, detect_reasoning
from workers.text.formats.table import detect_tool_format
from workers.text.grammar import GrammarCompiler, Guide
from workers.text.reply import MarkedParser, Reply, ReplyParser
from workers.text.schemas import check_schema, for_grammar, read_schema

_TAIL_TOKENS = 16
_HARMONY_CLOSE = "<|end|><|start|>assistant"
_HARMONY_ANSWER = "<|channel|>final<|message|>"


@dataclass(frozen=True, slots=True)
class ReplyPlan:
    """Everything a reply needs but the number of its tokens; make one reply of it.

    Attributes:
        takes_time: making it waited for something, so that the queue may have changed.
    """

    decode: Decode
    stops: tuple[str, ...]
    parser: ReplyParser | None = None
    guide: Guide | None = None
    new_call_id: Callable[[], str] = str
    single_call: bool = False
    budget_tokens: int | None = None
    close_ids: tuple[int, ...] = ()
    takes_time: bool = False

    def reply(self, max_tokens: int) -> Reply:
        """Return the reply, at its beginning."""
        return Reply(
            self.decode,
            max_tokens=max_tokens,
            parser=self.parser,
            stops=self.stops,
            guide=self.guide,
            new_call_id=self.new_call_id,
            single_call=self.single_call,
            budget_tokens=self.budget_tokens,
            close_ids=self.close_ids,
        )


class ReplyPlanner:
    """Plans replies of one model. Methods are called from the asyncio loop only.

    Args:
        tokenizer: transformers' tokenizer, with its chat template.
        vocab_size: width of a row of logits.
        eos_ids: tokens that end a reply.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: frozenset[int]) -> None:
        template = template_text(tokenizer)
        self._tokenizer = tokenizer
        self._tool_format = detect_tool_format(template)
        self._is_harmony = "<|channel|>" in template and "<|message|>" in template
        self._reasoning = None if self._is_harmony else detect_reasoning(template)
        self._compiler = GrammarCompiler(tokenizer, vocab_size, eos_ids)
        self._added = {str(t.content): int(i) for i, t in tokenizer.added_tokens_decoder.items()}
        self._special_ids = {int(i) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._grammars: GrammarText | None = None

    @property
    def supports_tools(self) -> bool:
        """Whether the model's template shows tools to the model."""
        return self._tool_format is not None

    @property
    def supports_reasoning(self) -> bool:
        """Whether the model's template knows thoughts."""
        return self._is_harmony or self._reasoning is not None

    @property
    def arguments_as_text(self) -> bool:
        """Whether the template joins the arguments of earlier calls as text."""
        return self._tool_format is not None and self._tool_format.arguments_as_text

    def close(self) -> None:
        """End the compiler's threads."""
        self._compiler.close()

    async def plan(self, request: GenerationRequest, prompt_ids: Sequence[int]) -> ReplyPlan:
        """Return the plan for one request.

        Raises:
            InvalidRequest: a schema or grammar cannot be followed; names the field.
            UnsupportedParameter: tools, of a model without.
        """
        is_chat = isinstance(request.prompt, ChatPrompt)
        use = request.tool_use if is_chat else ToolUse()
        if use.tools and self._tool_format is None:
            raise UnsupportedParameter("This model does not call tools.", param="tools")
        tools = {t.name: Tool(t.name, t.parameters, t.strict) for t in use.tools}
        thoughts = self._thoughts(prompt_ids) if is_chat else None
        constrained = request.constraint is not None or use.required or any(t.strict for t in use.tools)
        guide = await self._guide(request, tools, thoughts) if constrained else None
        if not is_chat or not (tools or self.supports_reasoning):
            return ReplyPlan(self._decoder(frozenset()), request.stop, guide=guide, takes_time=constrained)
        budget = request.reasoning.budget_tokens
        if request.reasoning.enabled is False and not self._is_harmony:
            budget = 0
        return ReplyPlan(
            decode=self._decoder(self._visible(bool(tools))),
            stops=request.stop,
            parser=self._parser(tools, thoughts, guide),
            guide=guide,
            new_call_id=self._tool_format.new_call_id if self._tool_format else str,
            single_call=bool(tools) and not use.parallel,
            budget_tokens=budget,
            close_ids=self._close_ids(guide) if budget is not None else (),
            takes_time=constrained,
        )

    def _thoughts(self, prompt_ids: Sequence[int]) -> Thoughts | None:
        """Return what the reply may begin with; None without reasoning, or where the prompt has closed it."""
        if self._reasoning is None:
            return None
        tail = str(self._tokenizer.decode(list(prompt_ids[-_TAIL_TOKENS:]), skip_special_tokens=False)).rstrip()
        if tail.endswith(self._reasoning.close):
            return None
        return Thoughts(self._reasoning, opened=tail.endswith(self._reasoning.open.rstrip()))

    def _parser(self, tools: Mapping[str, Tool], thoughts: Thoughts | None, guide: Guide | None) -> ReplyParser:
        if self._is_harmony:
            return HarmonyParser(tools)
        calls = None
        if tools and self._tool_format is not None:
            # A guided reply that must mark its calls cannot make one without.
            allow_bare = guide is None or self._tool_format.text.trigger is None
            calls = CallParser(self._tool_format.syntax, tools, allow_bare=allow_bare)
        splitter = None if thoughts is None else ThoughtSplitter(thoughts.format, opened=thoughts.opened)
        return MarkedParser(splitter, calls)

    def _visible(self, with_tools: bool) -> frozenset[int]:
        """Return ids of control tokens that the parser must see."""
        markers: list[str] = []
        if self._tool_format is not None and (with_tools or self._is_harmony):
            markers += self._tool_format.markers
        if self._reasoning is not None:
            markers += [self._reasoning.open.strip(), self._reasoning.close.strip()]
            markers += [c for c in self._added if c and c in self._reasoning.open]
        return frozenset(self._added[m] for m in markers if m in self._added)

    def _decoder(self, visible: frozenset[int]) -> Decode:
        hidden = self._special_ids - visible
        plain = _plain_decode(self._tokenizer)

        def decoded(ids: Sequence[int]) -> str:
            return plain([i for i in ids if i not in hidden])

        return decoded

    def _close_ids(self, guide: Guide | None) -> tuple[int, ...]:
        if self._is_harmony:
            text = _HARMONY_CLOSE + ("" if guide else _HARMONY_ANSWER)
        elif self._reasoning is not None:
            text = self._reasoning.close + "\n\n"
        else:
            return ()
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    # ------------------------------------------------------------ grammars

    async def _guide(self, request: GenerationRequest, tools: Mapping[str, Tool], thoughts: Thoughts | None) -> Guide:
        if self._grammars is None:
            await self._compiler.warm_up()
            controls = {text: i for text, i in self._added.items() if self._compiler.is_marker(i)}
            self._grammars = GrammarText(controls)
        grammar, param = await asyncio.to_thread(self._grammar, self._grammars, request, tools, thoughts)
        return await self._compiler.guide(grammar, param)

    def _grammar(
        self, grammars: GrammarText, request: GenerationRequest, tools: Mapping[str, Tool], thoughts: Thoughts | None
    ) -> tuple[str, str]:
        """Return (grammar, the field to blame). Blocking: milliseconds for large schemas."""
        use, constraint = request.tool_use, request.constraint
        is_chat = isinstance(request.prompt, ChatPrompt)
        offered = list(tools.values())
        for tool in offered:
            check_schema(tool.schema, "tools")
        if offered and use.required and self._tool_format is not None:
            return grammars.calls(self._tool_format, offered, thoughts, parallel=use.parallel), "tools"
        answer, user = (None, None) if constraint is None else _answer(constraint)
        if offered and self._tool_format is not None:
            text = grammars.free_or_calls(self._tool_format, offered, thoughts, parallel=use.parallel, answer=answer)
        else:
            text = grammars.structured(answer or "TEXT", thoughts, harmony=self._is_harmony and is_chat)
        param = "tools" if constraint is None else constraint_param(constraint)
        if user is None:
            return text, param
        return json.dumps({"grammars": [{"lark_grammar": text}, {**user, "name": "user"}]}), param


def _plain_decode(tokenizer: Any) -> Decode:
    """Return ids to text, special tokens and all.

    A tokenizer that decodes as all fast ones do is asked without transformers' conversions around it: they take three
    times as long as the decoding, twice a token.
    """
    kind, usual = type(tokenizer), PreTrainedTokenizerFast
    if issubclass(kind, usual) and kind.decode is usual.decode and kind._decode is usual._decode:
        decode = tokenizer.backend_tokenizer.decode
        return lambda ids: decode(ids, skip_special_tokens=False)
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def template_text(tokenizer: Any) -> str:
    """Return the text of a tokenizer's chat template, of all of them where it has several; empty for none."""
    template = getattr(tokenizer, "chat_template", None)
    return "\n".join(map(str, template.values())) if isinstance(template, dict) else str(template or "")


def constraint_param(constraint: Constraint) -> str:
    """Return the request field that a constraint came from."""
    return "response_format" if constraint.kind.startswith("json") else "structured_outputs"


def _answer(constraint: Constraint) -> tuple[str, dict[str, Any] | None]:
    """Return (Lark expression of the answer, grammar named `user` that it refers to)."""
    param = constraint_param(constraint)
    if constraint.kind == "json_object":
        return "%json " + for_grammar({"type": "object"}), None
    if constraint.kind == "json_schema":
        return "%json " + for_grammar(read_schema(constraint.text, param)), None
    if not constraint.text.strip():
        raise InvalidRequest(f"'{param}' is empty.", param=param)
    if constraint.kind == "regex":
        grammar = json.loads(llguidance.LLMatcher.grammar_from_regex(constraint.text))
        return "@user", grammar["grammars"][0]
    return "@user", {"lark_grammar": constraint.text}
