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
from gateway.dialects.sampling import parse_max_tokens, parse_sampling, parse_stop, parse_template_kwargs
from gateway.fields import Fields, show, wrong_type
from gateway.links import Link
from gateway.terms import read_batch, read_keep_alive_ms

MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_MCP_SERVERS = 32
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
        mcp_servers: configured MCP servers whose tools are called here; None: as the configuration has it.
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
    mcp_servers: tuple[str, ...] | None = None

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
    model = fields.model()
    _refuse(fields)
    links: list[Link] = []
    messages = parse_messages(fields, links)
    tools = parse_tools(fields)
    mcp_servers = parse_mcp_servers(fields)
    choice = parse_tool_choice(fields, tools, has_more=bool(mcp_servers))
    chat = pb.Chat(
        messages=messages,
        tools=tools,
        tool_choice=choice,
        reasoning=parse_reasoning(fields),
        template_kwargs_json=parse_template_kwargs(fields),
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
            sampling=parse_sampling(fields),
            max_tokens=parse_max_tokens(fields),
            stop=parse_stop(fields),
            top_logprobs=_top_logprobs(fields),
            constraint=parse_constraint(fields),
            keep_alive_ms=read_keep_alive_ms(fields),
            batch=read_batch(fields),
        ),
        links=tuple(links),
        media=media_of(messages),
        forces_tools=choice is not None and choice.mode == pb.TOOL_CHOICE_MODE_REQUIRED,
        num_text_bytes=sum(len(part.text) for message in messages for part in message.parts),
        mcp_servers=mcp_servers,
    )


def parse_mcp_servers(fields: Fields) -> tuple[str, ...] | None:
    """Return the MCP servers that the request names; None when it leaves them to the configuration."""
    names = fields.array("mcp_servers", MAX_MCP_SERVERS)
    if names is None:
        return None
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise wrong_type(f"{fields.name_of('mcp_servers')}[{index}]", "a string", name)
    return tuple(dict.fromkeys(names))


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
    if request.mcp_servers and not info.supports_tools:
        raise UnsupportedParameter(
            f"The model {show(request.model)} cannot call tools, those of MCP servers included.", param="mcp_servers"
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
    fields.refuse(_REFUSED)
    for modality in fields.array("modalities", 8) or []:
        if modality != "text":
            raise UnsupportedParameter(
                f"'modalities' {show(modality)} is not supported; only 'text' is.", param="modalities"
            )


def _top_logprobs(fields: Fields) -> int | None:
    wanted = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if wanted:
        return top or 0
    if top:
        raise InvalidRequest("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
    return None


def media_of(messages: list[pb.Message]) -> dict[str, str]:
    """Return each kind of media in a conversation, and the first field that has it."""
    found: dict[str, str] = {}
    for number, message in enumerate(messages):
        for index, part in enumerate(message.parts):
            kind = part.WhichOneof("part")
            if kind is not None and kind != "text":
                found.setdefault(kind, f"messages[{number}].content[{index}]")
    return found
