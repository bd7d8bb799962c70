"""What a model's directory says of it, without its weights: configuration, tokenizer, what ends a reply, cache size.

Above: `opening.py`. Beside it: `loader.py` (weights as transformers modules) and `native/recipe.py` (weights straight
from the files). Nothing here imports a model definition of transformers: that alone takes seconds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hostler.errors import ModelLoadFailed
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from workers.engine import LoadSpec, ModelFacts
from workers.text.adapters import Adapter
from workers.text.describe import FAMILIES, with_layers
from workers.text.kv_cache import BLOCK_TOKENS, MIN_BLOCKS, KVShape, blocks_for
from workers.text.native.build import built

if TYPE_CHECKING:
    from workers.text.vision import Vision

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_DEFAULT_KV_BYTES = 2 * 2**30
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention"}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        model: the transformers module, in eval mode on its device; runners are made of it (`opening.py`). None when the
            weights went from the files straight to the kernels.
        decoder: its text decoder (embedding, layers, norm), and `head`, the output projection; None as `model`.
        text_config: the decoder's configuration.
        tokenizer: transformers' tokenizer.
        eos_ids: tokens that end a reply.
        defaults: the model's own sampling defaults.
        kv: the cache's dimensions.
        facts: what the outside may know.
        vision: for models that take images.
        adapters: what `facts.adapters` names, in that order.
    """

    model: Any
    decoder: Any
    head: Any
    text_config: Any
    tokenizer: Any
    eos_ids: frozenset[int]
    defaults: dict[str, float]
    kv: KVShape
    facts: ModelFacts
    device: torch.device
    dtype: torch.dtype
    vision: Vision | None = None
    adapters: tuple[Adapter, ...] = ()

    def told(self, quantized: str, weight_bytes: int) -> LoadedModel:
        """Return the model with facts that say how its weights are really kept."""
        facts = replace(self.facts, dtype=quantized or self.facts.dtype, weight_bytes=weight_bytes)
        return replace(self, facts=facts)

    def free_weights(self) -> None:
        """Free the decoder's, the head's and the adapters' weights: the kernels have their own."""
        for adapter in self.adapters:
            adapter.release()
        for module in (self.decoder, self.head):
            for parameter in module.parameters():
                parameter.data = torch.empty(0, dtype=parameter.dtype)

    def without_weights(self) -> LoadedModel:
        """Return what is left of the model while it sleeps."""
        return replace(self, model=None, decoder=None, head=None, vision=None)

    def at(self, directory: Directory) -> LoadedModel:
        """Return the model, in the dtype it has, on the device of `directory` and with a cache as large."""
        kv = directory.kv.in_dtype(self.dtype.itemsize, directory.dtype.itemsize)
        facts = replace(self.facts, max_context_tokens=kv.max_context_tokens)
        return replace(self, kv=kv, facts=facts, device=directory.device)

    def with_dtype(self, dtype: torch.dtype) -> LoadedModel:
        """Return the model converted, in place, to another dtype; its cache has as many bytes as before."""
        if dtype == self.dtype:
            return self
        itemsize, was = dtype.itemsize, self.dtype.itemsize
        kv = self.kv.in_dtype(itemsize, was)
        facts = replace(
            self.facts,
            dtype=str(dtype).removeprefix("torch."),
            max_context_tokens=kv.max_context_tokens,
            weight_bytes=self.facts.weight_bytes * itemsize // was,
            kv_bytes_per_token=kv.bytes_per_token(itemsize),
        )
        return replace(self, model=self.model.to(dtype), kv=kv, facts=facts, dtype=dtype)


def choose_dtype(
    wanted: str, config_dtype: torch.dtype | None, device: torch.device, *, has_kernels: bool = False
) -> torch.dtype:
    """Return the serving dtype: as wanted; else bfloat16 where that is fast, else float32.

    Our own kernels (`has_kernels`) read bfloat16 weights on any processor and compute in float32; torch's need a
    processor that multiplies bfloat16 itself.
    """
    if wanted != "auto":
        return _DTYPES[wanted]
    if device.type == "cpu":
        if has_kernels and config_dtype != torch.float32:
            return torch.bfloat16
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast and config_dtype != torch.float32 else torch.float32
    return config_dtype if config_dtype in (torch.bfloat16, torch.float16) else torch.bfloat16


@dataclass(frozen=True, slots=True)
class Directory:
    """A model's directory, read but for its weights.

    Attributes:
        config: transformers' configuration; `text` that of its text decoder, the same object for a plain text model.
        compilable: whether kernels may run it once they are compiled; `kernels`: whether they are.
    """

    path: Path
    config: Any
    text: Any
    tokenizer: Any
    generation: GenerationConfig
    device: torch.device
    dtype: torch.dtype
    kv: KVShape
    compilable: bool
    kernels: bool

    def at(self, spec: LoadSpec) -> Directory:
        """Return the same directory for the devices of `spec` and a cache of its size. Reads no file of the model.

        Raises:
            ModelLoadFailed: the cache is too small.
        """
        return _placed(self.path, self.config, self.tokenizer, self.generation, spec)

    def first_layers(self, count: int) -> Directory:
        """Return the same directory as of a plain text model that has its first layers alone."""
        config = with_layers(self.text, count)
        return replace(self, config=config, text=config, kv=replace(self.kv, num_layers=count))

    @property
    def weight_files(self) -> list[Path]:
        """The files of its weights, in order."""
        return sorted(self.path.glob("*.safetensors"))

    def loaded(
        self,
        spec: LoadSpec,
        *,
        architecture: str,
        num_parameters: int,
        weight_bytes: int,
        model: Any = None,
        vision: Vision | None = None,
        adapters: tuple[Adapter, ...] = (),
    ) -> LoadedModel:
        """Return the model that came of it."""
        facts = ModelFacts(
            model=spec.model,
            engine="text",
            architecture=architecture,
            dtype=str(self.dtype).removeprefix("torch."),
            max_context_tokens=self.kv.max_context_tokens,
            vocab_size=int(self.text.vocab_size),
            num_parameters=num_parameters,
            weight_bytes=weight_bytes,
            kv_bytes_per_token=self.kv.bytes_per_token(self.dtype.itemsize),
            supports_images=vision is not None,
            adapters=tuple(adapter.name for adapter in adapters),
        )
        return LoadedModel(
            model=model,
            decoder=None if model is None else model.get_decoder(),
            head=None if model is None else model.get_output_embeddings(),
            text_config=self.text,
            tokenizer=self.tokenizer,
            eos_ids=_eos_ids(self.tokenizer, self.generation, self.text),
            defaults=_defaults(self.generation),
            kv=self.kv,
            facts=facts,
            device=self.device,
            dtype=self.dtype,
            vision=vision,
            adapters=adapters,
        )


def read_directory(spec: LoadSpec) -> Directory:
    """Read `spec.path` but for its weights. Blocking: half a second.

    Raises:
        ModelLoadFailed: the directory or the architecture cannot be served; says which.
    """
    path = Path(spec.path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=spec.trust_remote_code, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=spec.trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ModelLoadFailed(f"The files of {spec.model} cannot be read: {type(error).__name__}.") from error
    text = config.get_text_config()
    odd = {kind for kind in getattr(text, "layer_types", None) or () if kind not in _ATTENTION_LAYERS}
    if odd:
        raise ModelLoadFailed(
            f"{spec.model} has layers that are not attention ({', '.join(sorted(odd))}): not served yet."
        )
    return _placed(path, config, tokenizer, _generation_config(path), spec)


def _placed(path: Path, config: Any, tokenizer: Any, generation: GenerationConfig, spec: LoadSpec) -> Directory:
    text, device = config.get_text_config(), torch.device(spec.device)
    # The kernels run decoders only; towers are torch's, and take what is fast for it.
    one_cpu = device.type == "cpu" and len(spec.devices) == 1
    compilable = one_cpu and config is text and text.model_type in FAMILIES
    kernels = compilable and built() is not None
    dtype = choose_dtype(spec.dtype, getattr(text, "dtype", None), device, has_kernels=kernels)
    return Directory(
        path=path,
        config=config,
        text=text,
        tokenizer=tokenizer,
        generation=generation,
        device=device,
        dtype=dtype,
        kv=kv_shape(spec, text, dtype),
        compilable=compilable,
        kernels=kernels,
    )


def num_kv_heads(text: Any) -> int:
    """Return how many key-value heads each layer of a text decoder has."""
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)


def kv_shape(spec: LoadSpec, text: Any, dtype: torch.dtype, kv_heads: int = 0) -> KVShape:
    """Return the cache's dimensions within the budget.

    Args:
        kv_heads: that are kept of each layer, on all devices together; 0 for as many as it has.

    Raises:
        ModelLoadFailed: the budget is too small to be of use.
    """
    heads = int(text.num_attention_heads)
    kv_heads = kv_heads or num_kv_heads(text)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    context = int(text.max_position_embeddings)
    if spec.max_context_tokens:
        context = min(context, spec.max_context_tokens)
    layers = int(text.num_hidden_layers)
    per_token = 2 * layers * kv_heads * head_dim * dtype.itemsize
    num_blocks = (spec.kv_cache_bytes or _DEFAULT_KV_BYTES) // (per_token * BLOCK_TOKENS)
    if num_blocks < MIN_BLOCKS:
        raise ModelLoadFailed(
            f"{spec.kv_cache_bytes} bytes of KV cache hold only {num_blocks * BLOCK_TOKENS} tokens of {spec.model}; "
            f"give it at least {MIN_BLOCKS * BLOCK_TOKENS * per_token} (kv_cache in the configuration)."
        )
    # More than everybody's whole context is never needed.
    capacity = spec.max_running * blocks_for(context)
    num_blocks = min(num_blocks, capacity)
    return KVShape(layers, kv_heads, head_dim, num_blocks, min(context, num_blocks * BLOCK_TOKENS), capacity)


def _generation_config(path: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(path, local_files_only=True)
    except OSError:
        return GenerationConfig()  # type: ignore[no-untyped-call]


def _eos_ids(tokenizer: Any, generation: GenerationConfig, text: Any) -> frozenset[int]:
    ids: set[int] = set()
    for value in (generation.eos_token_id, tokenizer.eos_token_id, getattr(text, "eos_token_id", None)):
        if isinstance(value, int):
            ids.add(value)
        elif isinstance(value, list | tuple):
            ids.update(int(v) for v in value)
    return frozenset(ids)


def _defaults(generation: GenerationConfig) -> dict[str, float]:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return {name: float(value) for name in names if (value := getattr(generation, name, None)) is not None}
