"""An embeddings body → `EmbeddingsRequest`. Above: `routes.embeddings`; below: `fields`.

Every field is honoured, known to be harmless, or refused by name; unknown ones are ignored. `null` means absent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hostler.errors import InvalidRequest, UnsupportedParameter
from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.texts import TextOrIds, parse_texts
from gateway.fields import Fields

MAX_INPUTS = 2048
"""OpenAI's."""
MAX_DIMENSIONS = 65_536

# Would change the answer and cannot be honoured. The value is what is harmless to ask for.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "truncate_prompt_tokens": (),
    "add_special_tokens": (True,),
    "messages": ([],),
    "normalize": (True,),
}


@dataclass(frozen=True, slots=True)
class EmbeddingsRequest:
    """One validated request.

    Attributes:
        model: as the client wrote it.
        inputs: texts or token ids.
        as_base64: vectors are told as base64 of little-endian float32, else as numbers.
    """

    model: str
    inputs: list[TextOrIds]
    dimensions: int | None
    as_base64: bool

    def message(self) -> pb.EmbedRequest:
        """Return the contract's message."""
        return pb.EmbedRequest(
            inputs=[
                pb.EmbedInput(text=item) if isinstance(item, str) else pb.EmbedInput(token_ids=item)
                for item in self.inputs
            ],
            dimensions=self.dimensions,
        )


def parse_embeddings_request(body: dict[str, Any]) -> EmbeddingsRequest:
    """Validate a request.

    Raises:
        InvalidRequest: a field is missing, of the wrong type or out of bounds; `param` names it.
        UnsupportedParameter: a field asks for something that would change the answer and that we cannot do.
    """
    fields = Fields(body)
    model = fields.model()
    fields.refuse(_REFUSED)
    _refuse_media(fields.raw("input"))
    inputs = parse_texts(fields, "input", MAX_INPUTS)
    if "" in inputs:
        raise InvalidRequest("Invalid 'input': a text must not be empty.", param="input")
    return EmbeddingsRequest(
        model=model,
        inputs=inputs,
        dimensions=fields.integer("dimensions", 1, MAX_DIMENSIONS),
        as_base64=fields.choice("encoding_format", ("float", "base64")) == "base64",
    )


def _refuse_media(value: Any) -> None:
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
        raise UnsupportedParameter(
            "'input' holds an object, such as an image; only texts and token ids are taken.", param="input"
        )
