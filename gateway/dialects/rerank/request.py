"""A rerank body → `RankRequest`. Above: `routes.rerank`; below: `fields`.

Documents are texts, or objects with a `text`, as Cohere and Jina take them. `null` means absent; unknown fields are
ignored; those that would change the answer and cannot be honoured are refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hostler.errors import InvalidRequest

from gateway.fields import Fields, wrong_type

MAX_DOCUMENTS = 2048
_NO_CAP = 1 << 62  # the body's own cap bounds it
_REFUSED = ("rank_fields", "max_chunks_per_doc", "max_tokens_per_doc", "truncate_prompt_tokens")


@dataclass(frozen=True, slots=True)
class RankRequest:
    """One validated request.

    Attributes:
        model: as the client wrote it.
        top_n: how many results are told.
        return_documents: whether results carry their documents' text.
    """

    model: str
    query: str
    documents: tuple[str, ...]
    top_n: int
    return_documents: bool


def parse_rank_request(body: dict[str, Any]) -> RankRequest:
    """Validate a request.

    Raises:
        InvalidRequest: a field is missing, of the wrong type or out of bounds; `param` names it.
        UnsupportedParameter: a field asks for something that would change the answer and that we cannot do.
    """
    fields = Fields(body)
    model = fields.model()
    fields.refuse(dict.fromkeys(_REFUSED, ()))
    if fields.raw("query") is None:
        raise fields.missing("query")
    if fields.raw("documents") is None:
        raise fields.missing("documents")
    query = _text(fields.raw("query"), "query")
    if not query:
        raise InvalidRequest("Invalid 'query': it must not be empty.", param="query")
    documents = tuple(
        _text(item, f"documents[{index}]") for index, item in enumerate(fields.array("documents", MAX_DOCUMENTS) or [])
    )
    if not documents:
        raise InvalidRequest("Invalid 'documents': empty array. Expected at least one document.", param="documents")
    return RankRequest(
        model=model,
        query=query,
        documents=documents,
        top_n=fields.integer("top_n", 1, 2**31 - 1) or len(documents),
        return_documents=bool(fields.boolean("return_documents")),
    )


def _text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        text = Fields(value, name).string("text", _NO_CAP)
        if text is None:
            raise InvalidRequest(f"'{name}' is an object without a 'text'; only texts are ranked.", param=name)
        return text
    raise wrong_type(name, "a string or an object with a 'text'", value)
