"""How tokens are drawn and where a reply ends, in the words that OpenAI's dialects share. Below: `fields`.

Above: the request parsers of chat and responses. Besides OpenAI's own fields these are the ones that other servers
made usual: `top_k`, `min_p`, `repetition_penalty`, `chat_template_kwargs` and the like.
"""

from __future__ import annotations

from hostler.errors import InvalidRequest
from hostler.inference.v1 import inference_pb2 as pb

from gateway.fields import Fields, dump_json, show, wrong_type

MAX_STOPS = 16
MAX_STOP_CHARS = 512
MAX_LOGIT_BIAS = 1024
MAX_TEMPLATE_KWARGS_CHARS = 64 * 1024
_INT32 = 2**31 - 1
_UINT64 = 2**64 - 1


def parse_sampling(fields: Fields) -> pb.Sampling:
    """Return how tokens are drawn; what the request leaves open stays absent."""
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


def parse_max_tokens(fields: Fields) -> int | None:
    """Return the longest reply in tokens, by the newer name or the older one; None when neither is given."""
    newer = fields.integer("max_completion_tokens", 1, _INT32)
    older = fields.integer("max_tokens", 1, _INT32)
    return older if newer is None else newer


def parse_stop(fields: Fields) -> list[str]:
    """Return the texts that end a reply, none of them empty."""
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


def parse_template_kwargs(fields: Fields) -> str:
    """Return further variables of the model's chat template as JSON text; empty for none."""
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
