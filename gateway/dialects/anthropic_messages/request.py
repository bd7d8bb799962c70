"""A messages body → `MessagesRequest`, with the contract's message inside. Above: `routes.messages`; below: `fields`.

Every field is honoured, known to be harmless, or refused by name; unknown ones are ignored. `null` means absent.
Sampling and structured output have the extensions that chat has, under the same names.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from hostler.errors import InvalidRequest
from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.anthropic_messages.conversation import parse_conversation
from gateway.dialects.anthropic_messages.tools import parse_tool_choice, parse_tools
from gateway.dialects.openai_chat.constraint import only_one, schema_constraint
from gateway.dialects.openai_chat.request import ChatRequest
from gateway.dialects.sampling import MAX_STOP_CHARS, MAX_STOPS, parse_sampling, parse_template_kwargs
from gateway.fields import Fields, wrong_type
from gateway.terms import read_batch, read_keep_alive_ms

_INT32 = 2**31 - 1
# Would change the answer and cannot be honoured. The value is what is harmless to ask for.
_REFUSED: dict[str, tuple[Any, ...]] = {"mcp_servers": ([],)}
_EFFORTS = ("low", "medium", "high", "xhigh", "max")
# Templates know three words at most.
_MOST_EFFORT = {"xhigh": "high", "max": "high"}


class Thoughts(enum.Enum):
    """How a model's reasoning reaches the client."""

    UNASKED = enum.auto()
    """Not at all: whoever does not ask for it reads the first block as the answer."""
    OMITTED = enum.auto()
    """As a block without text, whose signature brings it back."""
    SHOWN = enum.auto()


@dataclass(frozen=True, slots=True)
class MessagesRequest:
    """One validated request.

    Attributes:
        chat: in the frame that every chat dialect shares.
        thoughts: what becomes of the model's reasoning.
        max_tokens: most tokens of the reply; None where only the prompt counts.
    """

    chat: ChatRequest
    thoughts: Thoughts
    max_tokens: int | None


def parse_messages_request(body: dict[str, Any]) -> MessagesRequest:
    """Validate and translate a request.

    Raises:
        InvalidRequest: a field is missing, of the wrong type or out of bounds; `param` names it.
        UnsupportedParameter: a field asks for something that would change the answer and that we cannot do.
    """
    fields = Fields(body)
    model = fields.model()
    max_tokens = fields.integer("max_tokens", 0, _INT32)
    if max_tokens is None:
        raise fields.missing("max_tokens")
    return _parse(fields, model, max_tokens)


def parse_count_request(body: dict[str, Any]) -> MessagesRequest:
    """The same for a request whose tokens are only counted; raises as `parse_messages_request`."""
    fields = Fields(body)
    return _parse(fields, fields.model(), None)


def _parse(fields: Fields, model: str, max_tokens: int | None) -> MessagesRequest:
    fields.refuse(_REFUSED)
    conversation = parse_conversation(fields)
    tools = parse_tools(fields, conversation.tool_changes)
    choice = parse_tool_choice(fields, tools)
    config = fields.child("output_config") or Fields({}, "output_config")
    effort = config.choice("effort", _EFFORTS)
    reasoning, thoughts = _thinking(fields, conversation.effort or effort)
    messages, stream = conversation.messages, bool(fields.boolean("stream"))
    generate = pb.GenerateRequest(
        chat=pb.Chat(
            messages=messages,
            tools=tools,
            tool_choice=choice,
            reasoning=reasoning,
            template_kwargs_json=parse_template_kwargs(fields),
            continue_final_message=conversation.continues,
        ),
        sampling=parse_sampling(fields),
        max_tokens=max_tokens,
        stop=_stop_sequences(fields),
        constraint=_constraint(fields, config),
        keep_alive_ms=read_keep_alive_ms(fields),
        batch=read_batch(fields),
        # A streamed message begins with the number of its prompt's tokens.
        wants_progress=stream,
    )
    chat = ChatRequest(
        model=model,
        stream=stream,
        include_usage=False,
        n=1,
        generate=generate,
        links=tuple(conversation.pictures.links),
        media={"image": conversation.pictures.first} if conversation.pictures.first else {},
        forces_tools=choice is not None and choice.mode == pb.TOOL_CHOICE_MODE_REQUIRED,
        num_text_bytes=sum(len(part.text) for message in messages for part in message.parts),
    )
    return MessagesRequest(chat, thoughts, max_tokens)


def _thinking(fields: Fields, effort: str | None) -> tuple[pb.Reasoning, Thoughts]:
    """Return how much the model may think, and who gets to see it. Without a word about it, it does not think."""
    thinking = fields.child("thinking")
    if thinking is None:
        return pb.Reasoning(enabled=False), Thoughts.UNASKED
    kind = thinking.choice("type", ("enabled", "disabled", "adaptive", "between_tools"))
    if kind is None:
        raise thinking.missing("type")
    if kind == "disabled":
        return pb.Reasoning(enabled=False), Thoughts.UNASKED
    is_omitted = thinking.choice("display", ("summarized", "omitted")) == "omitted"
    budget = thinking.integer("budget_tokens", 1, _INT32)
    if kind == "enabled" and budget is None:
        raise thinking.missing("budget_tokens")
    reasoning = pb.Reasoning(
        # Adaptive: the model decides, as its template has it.
        enabled=True if kind == "enabled" else None,
        effort=_MOST_EFFORT.get(effort or "", effort or ""),
        budget_tokens=budget,
    )
    return reasoning, Thoughts.OMITTED if is_omitted else Thoughts.SHOWN


def _stop_sequences(fields: Fields) -> list[str]:
    stops = fields.array("stop_sequences", MAX_STOPS) or []
    for index, stop in enumerate(stops):
        name = f"stop_sequences[{index}]"
        if not isinstance(stop, str):
            raise wrong_type(name, "a string", stop)
        if not stop or len(stop) > MAX_STOP_CHARS:
            raise InvalidRequest(f"Invalid '{name}': expected 1 to {MAX_STOP_CHARS} characters.", param=name)
    return stops


def _constraint(fields: Fields, config: Fields) -> pb.Constraint | None:
    # Earlier versions of the API had it at the top.
    form = config.child("format") or fields.child("output_format")
    if form is None:
        return only_one(fields, None, "output_config.format")
    if form.choice("type", ("json_schema",)) is None:
        raise form.missing("type")
    schema = form.object("schema")
    if schema is None:
        raise form.missing("schema")
    own = schema_constraint(schema, form.name_of("schema"), "output_config.format")
    return only_one(fields, own, "output_config.format")
