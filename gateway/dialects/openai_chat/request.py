"""A chat completions body → `ChatRequest`, with the contract's message inside. Above: `routes.chat`; below: `fields`.

Every field is honoured, known to be harmless, or refused by name; unknown ones are ignored. `null` means absent.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from hostler.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from hostler.inference.v1 import inference_pb2 as pb
from hostler.lifecycle.v1 import lifecycle_pb2

from gateway.dialects.openai_chat.constraint import parse_constraint
from gateway.dialects.openai_chat.generation_config import read_generation_config, with_defaults
from gateway.dialects.openai_chat.messages import parse_messages
from gateway.dialects.openai_chat.reasoning import parse_reasoning
from gateway.dialects.openai_chat.tools import parse_tool_choice, parse_tools
from gateway.fields import Fields, dump_json, show, wrong_type
from gateway.links import Link
from gateway.terms import read_batch, read_keep_alive_ms

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_STOP_CHARS = 512
MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 20
MAX_MODEL_CHARS = 256
MAX_TEMPLATE_KWARGS_CHARS = 64 * 1024
_INT32 = 2**31 - 1
_UINT64 = 2**64 - 1
# No vocabulary has longer tokens, so a prompt of more bytes per context token cannot fit. It spares the
# worker the tokenizing of megabytes; the exact check stays there.
_MAX_BYTES_PER_TOKEN = 256

# Would change the answer and cannot be honoured. The value is what is harmless to ask for.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "web_search_options": (),
    "best_of": (1,),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "length_penalty": (1,),
}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One validated request.

    Attributes:
        model: as the client wrote it.
        generate: the contract's message for the first choice; mutated only to fill in linked images, and by the
            dispatcher, which sets the caller's cache scope, the same for all choices (see `choice`).
        links: images given by address, in the order of the image parts without data.
        media: kind of media ("image", "audio", "file") → the first field that has it.
        forces_tools: a tool must be called.
        num_text_bytes: at least this much text is in the prompt.
    """

    model: str
    stream: bool
    include_usage: bool
    n: int
    generate: pb.GenerateRequest
    links: tuple[Link, ...]
    media: dict[str, str]
    forces_tools: bool
    num_text_bytes: int

    @property
    def wants_logprobs(self) -> bool:
        """Whether choices carry log probabilities."""
        return self.generate.HasField("top_logprobs")

    def choice(self, index: int) -> pb.GenerateRequest:
        """Return the message for one of the `n` choices: each has a seed of its own."""
        if self.n == 1:
            return self.generate
        copy = pb.GenerateRequest()
        copy.CopyFrom(self.generate)
        seeded = self.generate.sampling.HasField("seed")
        copy.sampling.seed = (copy.sampling.seed + index) & _UINT64 if seeded else secrets.randbits(63)
        return copy


def parse_chat_request(body: dict[str, Any]) -> ChatRequest:
    """Validate and translate a request.

    Raises:
        InvalidRequest: a field is missing, of the wrong type or out of bounds; `param` names it.
        UnsupportedParameter: a field asks for something that would change the answer and that we cannot do.
    """
    body = with_defaults(body, read_generation_config(body.get("generation_config")))
    fields = Fields(body)
    model = fields.string("model", MAX_MODEL_CHARS)
    if not model:
        raise InvalidRequest("You must provide a model parameter.", param="model")
    _refuse(fields)
    links: list[Link] = []
    messages = parse_messages(fields, links)
    tools = parse_tools(fields)
    choice = parse_tool_choice(fields, tools)
    chat = pb.Chat(
        messages=messages,
        tools=tools,
        tool_choice=choice,
        reasoning=parse_reasoning(fields),
        template_kwargs_json=_template_kwargs(fields),
        continue_final_message=bool(fields.boolean("continue_final_message")),
    )
    options = fields.child("stream_options")
    return ChatRequest(
        model=model,
        stream=bool(fields.boolean("stream")),
        include_usage=bool(options and options.boolean("include_usage")),
        n=fields.integer("n", 1, MAX_CHOICES) or 1,
        generate=pb.GenerateRequest(
            chat=chat,
            sampling=_sampling(fields),
            max_tokens=_max_tokens(fields),
            stop=_stop(fields),
            top_logprobs=_top_logprobs(fields),
            constraint=parse_constraint(fields),
            keep_alive_ms=read_keep_alive_ms(fields),
            batch=read_batch(fields),
        ),
        links=tuple(links),
        media=_media(messages),
        forces_tools=choice is not None and choice.mode == pb.TOOL_CHOICE_MODE_REQUIRED,
        num_text_bytes=sum(len(part.text) for message in messages for part in message.parts),
    )


def check_capabilities(request: ChatRequest, info: lifecycle_pb2.ModelInfo) -> None:
    """Refuse what the model is known to be unable to do, before any of its time is spent.

    Raises:
        InvalidRequest: media of a kind that the model does not take.
        UnsupportedParameter: a tool call is demanded of a model without tools.
        ContextLengthExceeded: the prompt cannot fit, whatever its tokens are.
    """
    takes = {"image": info.supports_images, "audio": info.supports_audio, "file": False}
    for kind, name in request.media.items():
        if not takes[kind]:
            article = "an" if kind[0] in "aeiou" else "a"
            raise InvalidRequest(
                f"'{name}' is {article} {kind}, and the model {show(request.model)} does not take those.", param=name
            )
    if request.forces_tools and not info.supports_tools:
        raise UnsupportedParameter(
            f"'tool_choice' demands a call, but the model {show(request.model)} cannot call tools.", param="tool_choice"
        )
    limit = info.max_context_tokens * _MAX_BYTES_PER_TOKEN
    if limit and request.num_text_bytes > limit:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {info.max_context_tokens} tokens. "
            f"Your messages hold {request.num_text_bytes} characters, which cannot fit. Shorten them.",
            param="messages",
        )


def _refuse(fields: Fields) -> None:
    for name, harmless in _REFUSED.items():
        value = fields.raw(name)
        if value is not None and value not in harmless:
            raise UnsupportedParameter(f"'{name}' is not supported. Remove it from the request.", param=name)
    for modality in fields.array("modalities", 8) or []:
        if modality != "text":
            raise UnsupportedParameter(
                f"'modalities' {show(modality)} is not supported; only 'text' is.", param="modalities"
            )


def _sampling(fields: Fields) -> pb.Sampling:
    top_k = fields.integer("top_k", -1, _INT32)
    top_p = fields.number("top_p", 0, 1)
    seed = fields.integer("seed", -(2**63), _UINT64)
    repetition = fields.number("repetition_penalty", 0.01, 10)
    if repetition is None:
        repetition = fields.number("repeat_penalty", 0.01, 10)
    return pb.Sampling(
        temperature=fields.number("temperature", 0, 2),
        # 0 would leave no token at all; the smallest share that leaves one is the likeliest token's.
        top_p=None if top_p is None else max(top_p, 1e-6),
        top_k=None if top_k is None else max(top_k, 0),
        min_p=fields.number("min_p", 0, 1),
        seed=None if seed is None else seed & _UINT64,
        frequency_penalty=fields.number("frequency_penalty", -2, 2),
        presence_penalty=fields.number("presence_penalty", -2, 2),
        repetition_penalty=repetition,
        logit_bias=_logit_bias(fields),
        ignore_eos=bool(fields.boolean("ignore_eos")),
    )


def _logit_bias(fields: Fields) -> dict[int, float]:
    values = fields.object("logit_bias")
    if not values:
        return {}
    if len(values) > MAX_LOGIT_BIAS:
        raise InvalidRequest(
            f"Invalid 'logit_bias': too many entries. Expected at most {MAX_LOGIT_BIAS}, but got {len(values)}.",
            param="logit_bias",
        )
    reader = Fields(values, "logit_bias")
    biases = {}
    for key in values:
        if not (key.isascii() and key.isdigit() and len(key) <= 9):
            raise InvalidRequest(f"Invalid 'logit_bias': {show(key)} is not a token id.", param="logit_bias")
        if (bias := reader.number(key, -100, 100)) is not None:
            biases[int(key)] = bias
    return biases


def _max_tokens(fields: Fields) -> int | None:
    newer = fields.integer("max_completion_tokens", 1, _INT32)
    older = fields.integer("max_tokens", 1, _INT32)
    return older if newer is None else newer


def _stop(fields: Fields) -> list[str]:
    value = fields.raw("stop")
    if value is None:
        return []
    if isinstance(value, str):
        value = [value]
    elif not isinstance(value, list):
        raise wrong_type("stop", "a string or an array of strings", value)
    if len(value) > MAX_STOPS:
        raise InvalidRequest(
            f"Invalid 'stop': array too long. Expected at most {MAX_STOPS} items, but got {len(value)}.", param="stop"
        )
    for index, item in enumerate(value):
        if not isinstance(item, str):
            raise wrong_type(f"stop[{index}]", "a string", item)
        if len(item) > MAX_STOP_CHARS:
            raise InvalidRequest(
                f"Invalid 'stop[{index}]': string too long. Expected at most {MAX_STOP_CHARS} characters, "
                f"but got {len(item)}.",
                param="stop",
            )
    return [item for item in value if item]


def _top_logprobs(fields: Fields) -> int | None:
    wanted = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if wanted:
        return top or 0
    if top:
        raise InvalidRequest("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
    return None


def _template_kwargs(fields: Fields) -> str:
    values = fields.object("chat_template_kwargs")
    if not values:
        return ""
    text = dump_json(values, "chat_template_kwargs")
    if len(text) > MAX_TEMPLATE_KWARGS_CHARS:
        raise InvalidRequest(
            f"Invalid 'chat_template_kwargs': longer than {MAX_TEMPLATE_KWARGS_CHARS} characters.",
            param="chat_template_kwargs",
        )
    return text


def _media(messages: list[pb.Message]) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, message in enumerate(messages):
        for index, part in enumerate(message.parts):
            kind = part.WhichOneof("part")
            if kind is not None and kind != "text":
                found.setdefault(kind, f"messages[{number}].content[{index}]")
    return found
