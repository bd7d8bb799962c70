"""A completions body → `CompletionRequest`, one message of the contract for each choice. Above: `routes.completions`.

Every field is honoured, known to be harmless, or refused by name; unknown ones are ignored. `null` means absent.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from hostler.errors import InvalidRequest, UnsupportedParameter
from hostler.inference.v1 import inference_pb2 as pb
from hostler.lifecycle.v1 import lifecycle_pb2

from gateway.dialects.openai_chat.constraint import parse_constraint
from gateway.dialects.openai_chat.request import MAX_CHOICES, MAX_TOP_LOGPROBS
from gateway.dialects.sampling import parse_sampling, parse_stop
from gateway.dialects.texts import TextOrIds, check_lengths, parse_texts
from gateway.fields import Fields, show
from gateway.terms import read_batch, read_keep_alive_ms

MAX_GENERATIONS = 128
"""Most replies of one request: prompts times choices."""
DEFAULT_MAX_TOKENS = 16
_INT32 = 2**31 - 1
_UINT64 = 2**64 - 1
_NO_CAP = 1 << 62  # the body's own cap bounds it

# Would change the answer and cannot be honoured. The value is what is harmless to ask for.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "add_special_tokens": (True,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "length_penalty": (1,),
}


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One validated request.

    Attributes:
        model: as the client wrote it.
        prompts: texts or token ids.
        generate: the contract's message without its prompt; `choice` makes whole ones of it.
        n: choices for each prompt that the reply has.
        best_of: choices for each prompt that are generated.
        logprobs: how many of the likeliest tokens are told beside each; None for no logprobs at all.
        echo: the reply's text begins with the prompt.
    """

    model: str
    stream: bool
    include_usage: bool
    prompts: tuple[TextOrIds, ...]
    generate: pb.GenerateRequest
    n: int
    best_of: int
    logprobs: int | None
    echo: bool

    def choices(self) -> list[pb.GenerateRequest]:
        """Return the message of each generation: of the first prompt `best_of` ones, then of the second …"""
        return [self._choice(prompt, at) for prompt in self.prompts for at in range(self.best_of)]

    def _choice(self, prompt: TextOrIds, at: int) -> pb.GenerateRequest:
        message = pb.GenerateRequest()
        message.CopyFrom(self.generate)
        if isinstance(prompt, str):
            message.text = prompt
        else:
            message.token_ids.CopyFrom(prompt)
        if self.best_of > 1:
            seeded = message.sampling.HasField("seed")
            message.sampling.seed = (message.sampling.seed + at) & _UINT64 if seeded else secrets.randbits(63)
        return message


def parse_completion_request(body: dict[str, Any]) -> CompletionRequest:
    """Validate and translate a request.

    Raises:
        InvalidRequest: a field is missing, of the wrong type or out of bounds; `param` names it.
        UnsupportedParameter: a field asks for something that would change the answer and that we cannot do.
    """
    fields = Fields(body)
    model = fields.model()
    fields.refuse(_REFUSED)
    # OpenAI's default: a document from its beginning.
    prompts: list[TextOrIds] = [""]
    if fields.raw("prompt") is not None:
        prompts = parse_texts(fields, "prompt", MAX_GENERATIONS)
    stream = bool(fields.boolean("stream"))
    n, best_of = _counts(fields, len(prompts), stream=stream)
    echo = bool(fields.boolean("echo"))
    suffix = _suffix(fields, prompts, echo=echo)
    logprobs = fields.integer("logprobs", 0, MAX_TOP_LOGPROBS)
    max_tokens = fields.integer("max_tokens", 0, _INT32)
    options = fields.child("stream_options")
    return CompletionRequest(
        model=model,
        stream=stream,
        include_usage=bool(options and options.boolean("include_usage")),
        prompts=tuple(prompts),
        generate=pb.GenerateRequest(
            sampling=parse_sampling(fields),
            max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
            stop=parse_stop(fields),
            # The best of several is told by their logprobs.
            top_logprobs=0 if logprobs is None and best_of > n else logprobs,
            constraint=parse_constraint(fields),
            suffix=suffix,
            echo_logprobs=echo and logprobs is not None,
            keep_alive_ms=read_keep_alive_ms(fields),
            batch=read_batch(fields),
        ),
        n=n,
        best_of=best_of,
        logprobs=logprobs,
        echo=echo,
    )


def check_model(request: CompletionRequest, info: lifecycle_pb2.ModelInfo) -> None:
    """Refuse what the model is known to be unable to do, before any of its time is spent.

    Raises:
        UnsupportedParameter: a suffix, of a model that fills no gaps.
        ContextLengthExceeded: a prompt cannot fit, whatever its tokens are.
    """
    if request.generate.suffix and not info.supports_fill_in_middle:
        raise UnsupportedParameter(
            f"'suffix' asks for text between two others, and the model {show(request.model)} does not do that.",
            param="suffix",
        )
    check_lengths(list(request.prompts), info.max_context_tokens, "prompt")


def _counts(fields: Fields, num_prompts: int, *, stream: bool) -> tuple[int, int]:
    n = fields.integer("n", 1, MAX_CHOICES) or 1
    best_of = fields.integer("best_of", 1, MAX_CHOICES) or n
    if best_of < n:
        raise InvalidRequest(
            f"Invalid 'best_of': it must not be less than 'n' ({n}), but it is {best_of}.", param="best_of"
        )
    if best_of > n and stream:
        raise InvalidRequest(
            "'best_of' larger than 'n' cannot be streamed: the best is known at the end.", param="best_of"
        )
    if num_prompts * best_of > MAX_GENERATIONS:
        raise InvalidRequest(
            f"{num_prompts} prompts with {best_of} choices each are more than {MAX_GENERATIONS} replies. Ask for fewer "
            "at once.",
            param="prompt",
        )
    return n, best_of


def _suffix(fields: Fields, prompts: list[TextOrIds], *, echo: bool) -> str:
    suffix = fields.string("suffix", _NO_CAP) or ""
    if suffix and not all(isinstance(prompt, str) for prompt in prompts):
        raise InvalidRequest("'suffix' needs a prompt of text, not of token ids.", param="suffix")
    if suffix and echo:
        raise UnsupportedParameter("'echo' is not supported together with 'suffix'. Remove one of them.", param="echo")
    return suffix
