"""The seam between a worker's gRPC edge and whatever runs its model.

Above: `server.py` and its servicers, which turn the wire into these dataclasses. Below: the text engine
(`workers/text/`), the scripted engine (`scripted.py`). Nothing here imports torch or grpc.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

Json = object

QUANTIZED_KINDS = frozenset({"", "int8", "int4"})
"""What `LoadSpec.quantize` may be; empty keeps the weights as they are."""


@dataclass(frozen=True, slots=True)
class ImageInput:
    """A picture as it was sent.

    Attributes:
        data: the file's bytes, undecoded and untrusted.
        detail: "low" allows the engine to look at a smaller version; anything else asks for all of it.
    """

    data: bytes = field(repr=False)
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Structured messages, rendered by the model's own template.

    Attributes:
        messages: as chat templates expect them: dicts with role, content, perhaps tool_calls, tool_call_id, name.
            Content is text or, where there are images, a list of `{"type": "text", "text": …}` and `{"type": "image"}`.
        tools: JSON-schema function tools as templates expect them; empty for none.
        template_kwargs: extra template variables.
        continue_final_message: extend the last assistant message instead of opening a new one.
        images: the pictures of the messages' image parts, in the order of those parts.
    """

    messages: Sequence[Mapping[str, Json]]
    tools: Sequence[Mapping[str, Json]] = ()
    template_kwargs: Mapping[str, Json] = field(default_factory=dict)
    continue_final_message: bool = False
    images: Sequence[ImageInput] = ()


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text that a caller wrote as the model is to see it: spellings of control tokens in it are control tokens.

    Attributes:
        suffix: what comes after the gap that the reply fills; empty for none. With it, `text` is what comes before, and
            both are plain text without control tokens.
        add_special_tokens: put the model's own before and after it, as its tokenizer does.
    """

    text: str
    suffix: str = ""
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, taken as they are."""

    ids: tuple[int, ...]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. None means the model's own default, else the neutral value."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a reply must be. `kind` is "json_object", "json_schema", "regex" or "lark"; `text` the schema or grammar."""

    kind: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool that may be called; `parameters` is its JSON Schema. Calls of a `strict` one must follow it."""

    name: str
    parameters: Mapping[str, Json] = field(default_factory=dict)
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How tools may be used.

    Attributes:
        tools: those that may be called; empty where none may.
        required: at least one call must be made.
        parallel: one reply may hold several calls.
    """

    tools: tuple[ToolSpec, ...] = ()
    required: bool = False
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class ReasoningRule:
    """How much to think. `enabled` None: as the template has it. `budget_tokens` None: without limit."""

    enabled: bool | None = None
    budget_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One choice for one prompt. `request_id` is for logs; identity inside an engine never rests on it.

    Requests of different `cache_scope` must never share cached state: who waits less would learn what others asked.
    `adapter` names one of `ModelFacts.adapters`; empty for the model itself. `batch`: it may wait behind requests that
    people wait for. `echo_logprobs` asks for `PromptLogprobs`, `wants_progress` for `Progress`.
    """

    prompt: Prompt
    request_id: str = ""
    sampling: SamplingParams = SamplingParams()
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    constraint: Constraint | None = None
    tool_use: ToolUse = ToolUse()
    reasoning: ReasoningRule = ReasoningRule()
    cache_scope: str = ""
    adapter: str = ""
    batch: bool = False
    echo_logprobs: bool = False
    wants_progress: bool = False


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's natural-log probability under the model's own distribution; `top` holds the likeliest."""

    token_id: int
    token: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """The request's turn has come: the length of its prompt, and how much of that was found in the cache; tokens."""

    num_prompt_tokens: int
    num_prefilled_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """The prompt's tokens, before any text. The first one's logprob is NaN: nothing came before it."""

    tokens: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text, whole characters only. May be empty when it only carries logprobs."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """New text of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins. `index` counts the calls of one reply from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """The next part of a call's arguments: JSON text."""

    index: int
    json_fragment: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """A call is complete."""

    index: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The last event of every served request. `reason` is "stop", "length" or "tool_calls"; times in microseconds."""

    reason: str
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int = 0
    num_reasoning_tokens: int = 0
    stop: str = ""
    queue_us: int = 0
    prefill_us: int = 0
    decode_us: int = 0


Event = (
    Progress | PromptLogprobs | TextDelta | ReasoningDelta | ToolCallStart | ToolCallArguments | ToolCallEnd | Finish
)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a loaded model is and can do; bytes and tokens.

    `adapters` are the names served beside it, `voices` those it speaks with; `loads_lighter`: the next load of this
    model will need less memory than this one did.
    """

    model: str
    engine: str
    architecture: str
    dtype: str
    max_context_tokens: int
    vocab_size: int = 0
    num_parameters: int = 0
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    supports_tools: bool = False
    supports_reasoning: bool = False
    supports_images: bool = False
    supports_audio: bool = False
    adapters: tuple[str, ...] = ()
    supports_fill_in_middle: bool = False
    embedding_dimensions: int = 0
    voices: tuple[str, ...] = ()
    loads_lighter: bool = False


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment's counters. `num_steps` rises with every step; it stands still only when idle or hung.

    Of the KV cache: what requests hold, what is backed by memory, what it may grow to.
    """

    num_steps: int = 0
    num_running: int = 0
    num_queued: int = 0
    max_running: int = 0
    kv_used_bytes: int = 0
    kv_allocated_bytes: int = 0
    kv_reserved_bytes: int = 0
    num_prompt_tokens_total: int = 0
    num_completion_tokens_total: int = 0


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """A LoRA adapter to serve beside the model: its public name, and the directory that peft wrote."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """Everything a worker is told about the one model it will own. Zeros and empty strings mean: choose.

    `devices`: as this process numbers them; several when the model is split. `shelf`: where the weights of the same
    model, asleep in another process, can be taken from memory; they are read from `path` where that fails.
    """

    model: str
    path: str
    devices: tuple[str, ...] = ("cpu",)
    dtype: str = "auto"
    max_context_tokens: int = 0
    max_running: int = 16
    max_queued: int = 256
    kv_cache_bytes: int = 0
    prefill_chunk_tokens: int = 768
    num_threads: int = 0
    quantize: str = ""
    trust_remote_code: bool = False
    adapters: tuple[AdapterSource, ...] = ()
    beams: int = 1
    shelf: str = ""

    @property
    def device(self) -> str:
        """The first device, the only one of a model that is not split."""
        return self.devices[0]


class Engine(Protocol):
    """Owns one loaded model. Methods are called from the worker's asyncio loop only."""

    @property
    def facts(self) -> ModelFacts:
        """What the model is; fixed for the engine's life."""

    def stats(self) -> EngineStats:
        """Counters as of now; cheap."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """Serve one request: deltas, then one `Finish`. Who asks for `Progress` gets it first.

        Closing the iterator at any point frees the request's slot within one step.

        Raises:
            HostlerError: refused or failed; other requests are unaffected.
        """

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """Return the prompt's token ids."""

    async def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the loop whenever running or queued counts change."""

    async def close(self) -> None:
        """Fail what still runs and free everything."""


@runtime_checkable
class Sleeper(Protocol):
    """An engine that keeps more than its files while it sleeps. Any other is closed, and opened anew to wake."""

    async def sleep(self) -> str:
        """Free weights and caches on the device, back to the system. Called only when no request runs.

        Returns:
            what `LoadSpec.shelf` of a worker on another device may be until this one wakes; empty where none can.
        """

    async def wake(self, spec: LoadSpec) -> None:
        """Serve again as before; `spec` is what the engine was opened with but for devices and size of the KV cache.

        Raises:
            HostlerError: it cannot; the engine is of no further use.
        """


@runtime_checkable
class Resizable(Protocol):
    """An engine with a cache whose bound can change while requests run."""

    async def resize(self, kv_cache_bytes: int) -> int:
        """Change what the cache may grow to; return what it became.

        Shrinking frees what only might be of use first, and stops at what running requests hold.
        """
