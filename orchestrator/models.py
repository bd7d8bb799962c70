"""What the orchestrator knows of a model before and after its files are found. Pure.

Above it: the scheduler's parts. Below it: the configuration, the policy's `Demand`, the lifecycle contract.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hostler.config import ModelConfig
from hostler.errors import UnsupportedParameter
from hostler.lifecycle.v1 import lifecycle_pb2

from orchestrator.views import Demand

FLOOR_CONTEXT_TOKENS = 4096
"""A model with a huge context loads with a KV cache of this many tokens rather than not at all."""


ENGINES = {
    "auto": lifecycle_pb2.ENGINE_KIND_UNSPECIFIED,
    "text": lifecycle_pb2.ENGINE_KIND_TEXT,
    "scripted": lifecycle_pb2.ENGINE_KIND_SCRIPTED,
    "embedding": lifecycle_pb2.ENGINE_KIND_EMBEDDING,
    "rerank": lifecycle_pb2.ENGINE_KIND_RERANK,
    "transcription": lifecycle_pb2.ENGINE_KIND_TRANSCRIPTION,
    "speech": lifecycle_pb2.ENGINE_KIND_SPEECH,
}
"""The configuration's words for engines, and the store's for what files are for."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model needs of a device, estimated from its files."""

    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    max_context_tokens: int = 0
    workspace_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Split:
    """How a model can be split over devices of one kind: into how many parts, and the copies of its keys and values.

    `kv_copies`: of a split into 2, 3 … parts, on how many parts each key and value is kept.
    """

    kind: str
    max_parts: int
    kv_copies: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Located:
    """A model's files on one machine (empty: this one); the path is empty for an engine without files."""

    path: str
    footprint: Footprint
    engine: int = lifecycle_pb2.ENGINE_KIND_UNSPECIFIED
    """Which engine its files are for; unspecified where only the spec can say."""
    node: str = ""
    splits: tuple[Split, ...] = ()
    """How it can be split, by kind of device; nothing where it cannot."""
    quantized: tuple[tuple[str, int], ...] = ()
    """By ways of quantizing that the spec does not use, the bytes that its weights would have."""
    on_gpu: Located | None = None
    """The same on a GPU, where that differs: no kernels of the CPU's quantize embeddings and experts there."""

    def on(self, kind: str) -> Located:
        """Return what holds on devices of a kind."""
        return self.on_gpu if kind == "cuda" and self.on_gpu is not None else self


NOWHERE = Located("", Footprint())
"""Of an engine without files."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model that can be served: from the configuration, or found in the store.

    Attributes:
        engine: unspecified: what its files are for is known once they are located.
        adapters: LoRA adapters served beside it: (public name, directory).
        keep_alive_s: how long it may be idle before it rests; None: until its room is needed.
        batch: it never displaces models that people wait for.
        max_devices: over how many devices it may be split; 0: as many as it needs.
    """

    name: str
    source: str
    revision: str | None = None
    aliases: tuple[str, ...] = ()
    adapters: tuple[tuple[str, str], ...] = ()
    engine: int = lifecycle_pb2.ENGINE_KIND_UNSPECIFIED
    device: str | None = None
    dtype: str = "auto"
    quantize: str = ""
    max_context_tokens: int = 0
    max_running: int = 16
    max_queued: int = 256
    kv_cache_bytes: int = 0
    prefill_chunk_tokens: int = 768
    beams: int = 1
    num_threads: int = 0
    preload: bool = False
    pinned: bool = False
    keep_alive_s: float | None = None
    batch: bool = False
    group: str = ""
    max_replicas: int = 1
    max_devices: int = 0
    trust_remote_code: bool = False
    created_unix_s: int = 0
    configured: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that clients may ask for: its own, its aliases, its adapters'."""
        return (self.name, *self.aliases, *(name for name, _ in self.adapters))

    @property
    def owned_by(self) -> str:
        """The organisation of an `org/name` source, as `/v1/models` shows it."""
        head, slash, _ = self.source.partition("/")
        return head if slash and head and not head.startswith((".", "~")) else "hostler"

    @property
    def has_files(self) -> bool:
        """False for the scripted engine, which is code alone."""
        return self.engine != lifecycle_pb2.ENGINE_KIND_SCRIPTED


def from_config(config: ModelConfig) -> ModelSpec:
    """Return the spec of one configured model. `engine: auto` is found out when its files are located."""
    return ModelSpec(
        name=config.name,
        source=config.source or config.name,
        revision=config.revision,
        aliases=config.aliases,
        adapters=tuple(config.adapters.items()),
        engine=ENGINES[config.engine],
        device=config.device,
        dtype=config.dtype,
        quantize=config.quantize or "",
        max_context_tokens=config.max_context_tokens,
        max_running=config.max_running,
        max_queued=config.max_queued,
        kv_cache_bytes=config.kv_cache,
        prefill_chunk_tokens=config.prefill_chunk_tokens,
        beams=config.beams,
        num_threads=config.num_threads,
        preload=config.preload,
        pinned=config.pinned,
        keep_alive_s=config.keep_alive,
        batch=config.priority == "batch",
        group=config.group,
        max_replicas=config.max_replicas,
        max_devices=config.max_devices,
        trust_remote_code=config.trust_remote_code,
    )


def check_options(spec: ModelSpec, engine: int) -> None:
    """Refuse options that only other engines have, as a worker would at its load: before there is one.

    Args:
        engine: the one that runs the model.

    Raises:
        UnsupportedParameter: names the option.
    """
    kind = next(word for word, number in ENGINES.items() if number == engine)
    for option, is_set, owner in (
        ("beams", spec.beams > 1, "transcription"),
        ("quantize", spec.quantize != "", "text"),
        ("adapters", bool(spec.adapters), "text"),
    ):
        if is_set and kind != owner:
            raise UnsupportedParameter(
                f"{spec.name} is run by the {kind} engine, and {option} is an option of the {owner} engine. "
                "Take it out of the model's configuration.",
                param=option,
            )


def recipe(spec: ModelSpec) -> str:
    """Return a short digest of what a worker is loaded with: of two that differ, one must be loaded anew."""
    parts = (
        spec.source,
        spec.revision,
        spec.adapters,
        spec.engine,
        spec.device,
        spec.dtype,
        spec.quantize,
        spec.max_context_tokens,
        spec.max_running,
        spec.max_queued,
        spec.kv_cache_bytes,
        spec.prefill_chunk_tokens,
        spec.beams,
        spec.num_threads,
        spec.trust_remote_code,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def context_tokens(spec: ModelSpec, footprint: Footprint) -> int:
    """Return the longest context that will be served: the configured one, capped by the model's own."""
    own = footprint.max_context_tokens
    return min(spec.max_context_tokens, own) if spec.max_context_tokens and own else spec.max_context_tokens or own


def context_bytes(spec: ModelSpec, footprint: Footprint) -> int:
    """Return the KV cache's bytes of one full context: with less, requests would end before their time."""
    return context_tokens(spec, footprint) * footprint.kv_bytes_per_token


def sleep_bytes(footprint: Footprint, kind: str) -> int:
    """Return the host memory that a worker is expected to hold asleep, until it has been measured.

    On a GPU the weights move there. On a CPU they are given up, since the files' pages stay cached anyway, and what is
    left is the process.
    """
    return footprint.workspace_bytes + (footprint.weight_bytes if kind == "cuda" else 0)


def demand(spec: ModelSpec, located: Located, *, num_others: int = 0, own_bytes: int = 0) -> Demand:
    """Return what the model asks of the policy.

    Args:
        num_others: other models that will want a share of the same devices.
        own_bytes: what it was measured to need beside its KV cache; 0: not measured yet, the footprint's estimate
            stands.

    An explicit `kv_cache` in the configuration is taken as it is.
    """
    footprint = located.footprint
    context = context_tokens(spec, footprint)
    one_context = context * footprint.kv_bytes_per_token
    floor = min(context, FLOOR_CONTEXT_TOKENS) * footprint.kv_bytes_per_token
    want = one_context * spec.max_running
    if spec.kv_cache_bytes:
        floor = one_context = want = spec.kv_cache_bytes
    return Demand(
        model=spec.name,
        device=spec.device,
        base_bytes=own_bytes or footprint.weight_bytes + footprint.workspace_bytes,
        kv_floor_bytes=floor,
        kv_context_bytes=one_context,
        kv_want_bytes=want,
        num_others=num_others,
        workspace_bytes=footprint.workspace_bytes,
        group=spec.group,
        quantized_bytes=tuple((kind, size + footprint.workspace_bytes) for kind, size in located.quantized),
    )


def load_request(
    spec: ModelSpec,
    located: Located,
    *,
    devices: Sequence[str],
    environment: Mapping[str, str],
    kv_cache_bytes: int,
    shelf: str = "",
) -> lifecycle_pb2.LoadRequest:
    """Return everything that a blank worker must know; `devices` as the worker's own process numbers them."""
    return lifecycle_pb2.LoadRequest(
        model=spec.name,
        engine=spec.engine or located.engine,  # type: ignore[arg-type]
        path=located.path,
        devices=devices,
        dtype=spec.dtype,
        quantize=spec.quantize,
        max_context_tokens=spec.max_context_tokens,
        max_running=spec.max_running,
        max_queued=spec.max_queued,
        kv_cache_bytes=kv_cache_bytes,
        prefill_chunk_tokens=spec.prefill_chunk_tokens,
        beams=spec.beams,
        num_threads=spec.num_threads,
        trust_remote_code=spec.trust_remote_code,
        adapters=[lifecycle_pb2.Adapter(name=name, path=path) for name, path in spec.adapters],
        environment=environment,
        shelf=shelf,
    )
