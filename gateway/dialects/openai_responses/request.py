"""A responses body → `ResponsesRequest`; with the turns before it → the contract. Above: the routes; below: `items`.

Every field is honoured, known to be harmless, or refused by name; unknown ones are ignored. `null` means absent.
Sampling, structured output and reasoning have the extensions that chat has, under the same names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hostler.errors import InvalidRequest
from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.openai_chat.constraint import only_one, schema_constraint
from gateway.dialects.openai_chat.reasoning import parse_reasoning
from gateway.dialects.openai_chat.request import MAX_TOP_LOGPROBS, ChatRequest, media_of
from gateway.dialects.openai_responses.items import MAX_ID_CHARS, Item, parse_input
from gateway.dialects.openai_responses.messages import build_messages
from gateway.dialects.openai_responses.tool_choice import parse_tool_choice
from gateway.dialects.openai_responses.tools import ToolTable, parse_tools
from gateway.dialects.sampling import parse_max_tokens, parse_sampling, parse_stop, parse_template_kwargs
from gateway.fields import Fields, dump_json
from gateway.links import Link
from gateway.terms import read_batch, read_keep_alive_ms

MAX_METADATA = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_CHARS = 512
_MAX_INSTRUCTIONS_CHARS = 1 << 62  # the body's own cap bounds it
_INT32 = 2**31 - 1
_LOGPROBS = "message.output_text.logprobs"
_SEALED = "reasoning.encrypted_content"

# Would change the answer and cannot be honoured. The value is what is harmless to ask for.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "prompt": (),
    "moderation": (),
    "context_management": ([],),
    "n": (1,),
    "best_of": (1,),
    "modalities": (["text"],),
}


@dataclass(frozen=True, slots=True)
class ResponsesRequest:
    """One validated request, before the turns that came before it are known.

    Attributes:
        model: as the client wrote it.
        store: None when the request leaves it open.
        items: of this turn, references unresolved.
        generate: all of the contract's message but the conversation.
        tools: what the names that the model may call stand for.
        fits: drop the oldest items of a conversation that does not fit, instead of refusing it.
        wants_summary: reasoning is wanted as a summary.
        wants_sealed: reasoning is wanted as `encrypted_content`, too.
        echo: fields of the request that the response object repeats.
    """

    model: str
    stream: bool
    background: bool
    store: bool | None
    previous_response_id: str | None
    conversation_id: str | None
    instructions: str | None
    items: tuple[Item, ...]
    generate: pb.GenerateRequest
    tools: ToolTable
    fits: bool
    wants_summary: bool
    wants_sealed: bool
    echo: dict[str, Any]

    @property
    def makes_calls_together(self) -> bool:
        """Whether calls that the model makes at once are also carried out at once."""
        return self.echo["parallel_tool_calls"] is not False

    @property
    def wants_logprobs(self) -> bool:
        """Whether output text carries log probabilities."""
        return self.generate.HasField("top_logprobs")

    def with_items(self, history: Sequence[Item], own: Sequence[Item]) -> ChatRequest:
        """Return the contract's request for a conversation, in the frame that every chat dialect shares.

        Args:
            history: items of earlier turns, oldest first.
            own: items of this turn, references resolved.

        Raises:
            InvalidRequest, UnsupportedParameter: a part of an item cannot be read; `param` names it.
        """
        named = [(f"history[{i}]", item) for i, item in enumerate(history)]
        named += [(f"input[{i}]", item) for i, item in enumerate(own)]
        links: list[Link] = []
        messages = build_messages(self.instructions, named, links)
        generate = pb.GenerateRequest()
        generate.CopyFrom(self.generate)
        generate.chat.messages.extend(messages)
        choice = generate.chat.tool_choice
        return ChatRequest(
            model=self.model,
            stream=self.stream,
            include_usage=False,
            n=1,
            generate=generate,
            links=tuple(links),
            media=media_of(messages),
            forces_tools=choice.mode == pb.TOOL_CHOICE_MODE_REQUIRED,
            num_text_bytes=sum(len(part.text) for message in messages for part in message.parts),
        )


def parse_responses_request(body: dict[str, Any]) -> ResponsesRequest:
    """Validate and translate a request.

    Raises:
        InvalidRequest: a field is missing, of the wrong type or out of bounds; `param` names it.
        UnsupportedParameter: a field asks for something that would change the answer and that we cannot do.
    """
    fields = Fields(body)
    model = fields.model()
    fields.refuse(_REFUSED)
    previous = fields.string("previous_response_id", MAX_ID_CHARS)
    conversation = _conversation(fields)
    if previous and conversation:
        raise InvalidRequest(
            "'previous_response_id' and 'conversation' cannot go together: send one of them.",
            param="previous_response_id",
        )
    items = parse_input(fields)
    if not items and not (previous or conversation):
        raise fields.missing("input")
    tools = parse_tools(fields)
    choice, tools = parse_tool_choice(fields, tools)
    include = _include(fields)
    store, background = fields.boolean("store"), bool(fields.boolean("background"))
    if background and store is False:
        raise InvalidRequest("'background' needs 'store': the answer is fetched from there.", param="background")
    reasoning = fields.child("reasoning") or Fields({}, "reasoning")
    summary = reasoning.choice("summary", ("auto", "concise", "detailed")) or reasoning.choice(
        "generate_summary", ("auto", "concise", "detailed")
    )
    text, constraint = _text(fields)
    truncation = fields.choice("truncation", ("auto", "disabled")) or "disabled"
    top_logprobs = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    max_tokens = fields.integer("max_output_tokens", 1, _INT32) or parse_max_tokens(fields)
    instructions = fields.string("instructions", _MAX_INSTRUCTIONS_CHARS)
    sampling, batch = parse_sampling(fields), read_batch(fields)
    generate = pb.GenerateRequest(
        chat=pb.Chat(
            tools=tools.tools,
            tool_choice=choice,
            reasoning=parse_reasoning(fields),
            template_kwargs_json=parse_template_kwargs(fields),
        ),
        sampling=sampling,
        max_tokens=max_tokens,
        stop=parse_stop(fields),
        top_logprobs=(top_logprobs or 0) if _LOGPROBS in include or top_logprobs else None,
        constraint=constraint,
        keep_alive_ms=read_keep_alive_ms(fields),
        batch=batch,
    )
    parallel = fields.raw("parallel_tool_calls")
    echo = {
        "previous_response_id": previous,
        "instructions": instructions,
        "tools": list(tools.echo),
        "tool_choice": _echoed_choice(fields.raw("tool_choice")),
        "truncation": truncation,
        "parallel_tool_calls": True if parallel is None else parallel,
        "text": text,
        "temperature": _number(fields.raw("temperature"), 1.0),
        "top_p": _number(fields.raw("top_p"), 1.0),
        "presence_penalty": _number(fields.raw("presence_penalty"), 0.0),
        "frequency_penalty": _number(fields.raw("frequency_penalty"), 0.0),
        "top_logprobs": top_logprobs or 0,
        "reasoning": {"effort": reasoning.string("effort", 32), "summary": summary},
        "max_output_tokens": max_tokens,
        "max_tool_calls": fields.integer("max_tool_calls", 1, _INT32),
        "background": background,
        "service_tier": "flex" if batch else "default",
        "metadata": parse_metadata(fields) or {},
        "user": fields.string("user", MAX_ID_CHARS * 4),
        "safety_identifier": fields.string("safety_identifier", MAX_ID_CHARS * 4),
        "prompt_cache_key": fields.string("prompt_cache_key", MAX_ID_CHARS * 4),
        "conversation": {"id": conversation} if conversation else None,
    }
    for name in ("tools", "tool_choice", "text"):
        # The object repeats these within further objects; what could not be written then is refused now.
        dump_json([[[[[[[[echo[name]]]]]]]]], name)
    return ResponsesRequest(
        model=model,
        stream=bool(fields.boolean("stream")),
        background=background,
        store=store,
        previous_response_id=previous,
        conversation_id=conversation,
        instructions=instructions,
        items=tuple(items or ()),
        generate=generate,
        tools=tools,
        fits=truncation == "auto",
        wants_summary=summary is not None,
        wants_sealed=_SEALED in include,
        echo=echo,
    )


def _number(value: Any, default: float) -> float:
    return default if value is None else float(value)


def _include(fields: Fields) -> set[str]:
    """Return what else the reply is to hold; names of what only OpenAI's own tools give are ignored."""
    return {name for name in fields.array("include", 64) or [] if isinstance(name, str)}


def _conversation(fields: Fields) -> str | None:
    if isinstance(fields.raw("conversation"), str):
        return fields.string("conversation", MAX_ID_CHARS)
    conversation = fields.child("conversation")
    if conversation is None:
        return None
    identity = conversation.string("id", MAX_ID_CHARS)
    if not identity:
        raise conversation.missing("id")
    return identity


def parse_metadata(fields: Fields) -> dict[str, str] | None:
    """Return the client's own notes, as OpenAI bounds them."""
    values = fields.object("metadata")
    if values is None:
        return None
    if len(values) > MAX_METADATA:
        raise InvalidRequest(f"Invalid 'metadata': more than {MAX_METADATA} keys.", param="metadata")
    notes = Fields(values, "metadata")
    for key in values:
        if len(key) > MAX_METADATA_KEY_CHARS:
            raise InvalidRequest(
                f"Invalid 'metadata': a key of more than {MAX_METADATA_KEY_CHARS} characters.", param="metadata"
            )
        notes.string(key, MAX_METADATA_CHARS)
    return {key: value for key, value in values.items() if value is not None}


def _text(fields: Fields) -> tuple[dict[str, Any], pb.Constraint | None]:
    """Return `text` as the response repeats it, and the constraint that it means."""
    text = fields.child("text") or Fields({}, "text")
    verbosity = text.choice("verbosity", ("low", "medium", "high")) or "medium"
    form = text.child("format")
    kind = None if form is None else form.choice("type", ("text", "json_object", "json_schema"))
    if form is not None and kind is None:
        raise form.missing("type")
    own, echo = None, {"type": kind or "text"}
    if kind == "json_object":
        own = pb.Constraint(json_object=True)
    elif form is not None and kind == "json_schema":
        own, echo = _schema(form)
    return {"format": echo, "verbosity": verbosity}, only_one(fields, own, "text.format")


def _schema(form: Fields) -> tuple[pb.Constraint, dict[str, Any]]:
    # Chat puts the schema one level lower, and so do some clients here.
    wrapper = form.child("json_schema") or form
    schema = wrapper.object("schema")
    if schema is None:
        raise wrapper.missing("schema")
    strict = wrapper.boolean("strict")  # a schema is always kept to
    echo = {
        "type": "json_schema",
        "name": wrapper.string("name", MAX_ID_CHARS) or "schema",
        "description": wrapper.string("description", 64 * 1024),
        "schema": schema,
        "strict": True if strict is None else strict,
    }
    return schema_constraint(schema, wrapper.name_of("schema"), "text.format"), echo


def _echoed_choice(value: Any) -> Any:
    """Return the tool choice in the one shape that this dialect has, also where the client wrote chat's."""
    if not isinstance(value, dict):
        return "auto" if value is None else value
    kind = value.get("type")
    inner = value.get(kind) if isinstance(kind, str) else None
    return {"type": kind, **inner} if isinstance(inner, dict) else value
