"""Every route: what it takes and answers. A new route is a line here; a test compares the two. Above: `document`."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.openapi.shapes import Schema, boolean, integer, one_of, string

_BODY_ERRORS = (400, 408, 413, 415)
_MODEL_ERRORS = (404, 429, 503)
# What any request may meet: no key, a Host that is not ours, a fault of ours.
ALWAYS = (401, 403, 500)


@dataclass(frozen=True, slots=True)
class Query:
    """One query parameter."""

    name: str
    schema: Schema
    is_required: bool = False


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path, as the routes know it: without /v1.

    Attributes:
        reply: schema of the 200 reply.
        takes: schema of the body; None for no body.
        sends: type of the body.
        streams: answers with an event stream when it is asked to, or always ("only").
        errors: statuses beyond `ALWAYS`.
        also: further statuses that answer with `reply`.
        error: schema of its errors.
        media: type of the 200 reply.
        is_under_v1: whether the public path begins with /v1.
    """

    method: str
    path: str
    tag: str
    summary: str
    reply: str
    takes: str | None = None
    streams: str = ""
    query: tuple[Query, ...] = ()
    errors: tuple[int, ...] = ()
    also: tuple[int, ...] = ()
    is_under_v1: bool = True
    needs_key: bool = True
    error: str = "Error"
    media: str = "application/json"
    sends: str = "application/json"

    @property
    def public_path(self) -> str:
        """The path as clients call it."""
        path = self.path.replace(":path}", "}")
        return f"/v1{path}" if self.is_under_v1 else path


_PAGE = (
    Query("limit", integer(1, 100)),
    Query("order", one_of("asc", "desc")),
    Query("after", string(maxLength=64)),
)
_STORED = (400, 404, 503)


def _generates(path: str, tag: str, summary: str, reply: str, takes: str, streams: str = "or") -> Operation:
    errors = (*_BODY_ERRORS, *_MODEL_ERRORS)
    return Operation("POST", path, tag, summary, reply, takes=takes, streams=streams, errors=errors)


def _admin(
    method: str,
    path: str,
    summary: str,
    reply: str,
    takes: str | None = None,
    streams: str = "",
    query: tuple[Query, ...] = (),
) -> Operation:
    return Operation(
        method,
        f"/admin{path}",
        "Administration",
        summary,
        reply,
        takes=takes,
        streams=streams,
        query=query,
        errors=(*(_BODY_ERRORS if takes else (400,)), *_MODEL_ERRORS),
        is_under_v1=False,
    )


_RESPONSE = "/responses/{response_id}"
_CONVERSATION = "/conversations/{conversation_id}"
_ITEM = f"{_CONVERSATION}/items/{{item_id}}"

OPERATIONS: tuple[Operation, ...] = (
    _generates("/chat/completions", "Chat", "Answer a conversation", "ChatCompletion", "ChatRequest"),
    _generates("/completions", "Chat", "Continue a text", "Completion", "CompletionRequest"),
    _generates("/responses", "Responses", "Answer, and keep what was said", "Response", "ResponsesRequest"),
    _generates("/responses/input_tokens", "Responses", "Count a prompt's tokens", "TokenCount", "ResponsesRequest", ""),
    Operation(
        "POST", "/messages", "Messages", "Answer a conversation, in Anthropic's dialect", "Message",
        takes="MessagesRequest", streams="or", errors=(*_BODY_ERRORS, *_MODEL_ERRORS), error="AnthropicError",
    ),
    Operation(
        "POST", "/messages/count_tokens", "Messages", "Count a prompt's tokens", "MessageTokens",
        takes="CountRequest", errors=(*_BODY_ERRORS, *_MODEL_ERRORS), error="AnthropicError",
    ),
    Operation(
        "GET", _RESPONSE, "Responses", "Return a stored response, or its events", "Response", streams="or",
        errors=_STORED, query=(Query("stream", boolean()), Query("starting_after", integer(0, 2**53))),
    ),
    Operation("DELETE", _RESPONSE, "Responses", "Forget a response", "DeletedResponse", errors=_STORED),
    Operation("POST", f"{_RESPONSE}/cancel", "Responses", "Stop a background response", "Response", errors=_STORED),
    Operation(
        "GET", f"{_RESPONSE}/input_items", "Responses", "List a response's input", "ItemList", query=_PAGE,
        errors=_STORED,
    ),
    Operation(
        "POST", "/conversations", "Conversations", "Make a conversation", "Conversation", takes="NewConversation",
        errors=(*_BODY_ERRORS, 503),
    ),
    Operation("GET", _CONVERSATION, "Conversations", "Describe a conversation", "Conversation", errors=_STORED),
    Operation(
        "POST", _CONVERSATION, "Conversations", "Replace a conversation's metadata", "Conversation",
        takes="ConversationChange", errors=(*_BODY_ERRORS, 404, 503),
    ),
    Operation("DELETE", _CONVERSATION, "Conversations", "Forget a conversation", "DeletedConversation", errors=_STORED),
    Operation(
        "GET", f"{_CONVERSATION}/items", "Conversations", "List items", "ItemList", query=_PAGE, errors=_STORED
    ),
    Operation(
        "POST", f"{_CONVERSATION}/items", "Conversations", "Add items", "ItemList", takes="NewItems",
        errors=(*_BODY_ERRORS, 404, 503),
    ),
    Operation("GET", _ITEM, "Conversations", "Return one item", "Item", errors=_STORED),
    Operation("DELETE", _ITEM, "Conversations", "Take an item out", "Conversation", errors=_STORED),
    _generates("/embeddings", "Vectors", "Make embeddings", "Embeddings", "EmbeddingsRequest", ""),
    _generates("/rerank", "Vectors", "Rank documents", "Ranking", "RankRequest", ""),
    Operation(
        "POST", "/v2/rerank", "Vectors", "Rank documents, for Cohere's client", "Ranking", takes="RankRequest",
        errors=(*_BODY_ERRORS, *_MODEL_ERRORS), is_under_v1=False,
    ),
    Operation(
        "POST", "/audio/speech", "Audio", "Say a text", "Sound", takes="SpeechRequest", streams="or", media="audio/*",
        errors=(*_BODY_ERRORS, *_MODEL_ERRORS),
    ),
    *(
        Operation(
            "POST", f"/audio/{name}", "Audio", summary, "Transcript", takes="TranscriptionForm", streams="or",
            errors=(*_BODY_ERRORS, *_MODEL_ERRORS), sends="multipart/form-data",
        )
        for name, summary in (
            ("transcriptions", "Write a recording down"), ("translations", "Write a recording down in English"),
        )
    ),
    Operation("GET", "/audio/models", "Audio", "List the models that hear or speak", "AudioModels", errors=(503,)),
    Operation(
        "GET", "/audio/voices", "Audio", "List voices", "Voices", query=(Query("model", string()),),
        errors=(400, 404, 503),
    ),
    _generates("/tokenize", "Tokens", "Return a prompt's token ids", "Tokens", "TokenizeRequest", ""),
    _generates("/detokenize", "Tokens", "Return the text of token ids", "Prompt", "DetokenizeRequest", ""),
    Operation("GET", "/models", "Models", "List what can be asked for", "ModelList", errors=(503,)),
    Operation("GET", "/models/{model:path}", "Models", "Describe a model", "Model", errors=(404, 503)),
    Operation(
        "POST", "/load_model", "Models", "Bring a model up, telling the progress", "Loaded", takes="ModelRequest",
        streams="only", errors=(*_BODY_ERRORS, *_MODEL_ERRORS), is_under_v1=False,
    ),
    Operation("GET", "/health", "Health", "Is this process alive?", "Health", is_under_v1=False, needs_key=False),
    Operation(
        "GET", "/ready", "Health", "Can requests be served?", "Readiness", query=(Query("model", string()),),
        also=(503,), errors=(404,), is_under_v1=False,
    ),
    Operation(
        "GET", "/metrics", "Health", "Numbers for Prometheus", "Metrics", is_under_v1=False, media="text/plain"
    ),
    Operation("GET", "/openapi.json", "Health", "Return this document", "OpenApi", is_under_v1=False),
    _admin("GET", "/status", "Show devices, models and replicas", "Status"),
    _admin("GET", "/plan", "Say what a load would do", "Plan", query=(Query("model", string(), is_required=True),)),
    _admin("POST", "/models/load", "Bring a model up", "Loaded", "LoadRequest", streams="or"),
    _admin("POST", "/models/unload", "Remove a model from memory", "Unloaded", "ModelRequest"),
    _admin("POST", "/models/sleep", "Take a model off its device", "Asleep", "ModelRequest"),
    _admin("POST", "/models/pin", "Keep a model from being evicted", "Pinned", "ModelRequest"),
    _admin("POST", "/models/unpin", "Let a model be evicted again", "Pinned", "ModelRequest"),
    _admin(
        "GET", "/events", "List what happened, or follow it", "Events", streams="or",
        query=(Query("max", integer(1, 10_000)), Query("follow", boolean())),
    ),
    _admin("GET", "/mcp", "List the MCP servers", "McpServers"),
    _admin("POST", "/mcp/test", "Connect to an MCP server and list its tools", "McpTried", "McpTry"),
)  # fmt: skip
