"""Loads a model directory: definition, weights, tokenizer, what ends a reply. Below stand transformers and torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hostler.errors import ModelLoadFailed
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from workers.engine import LoadSpec, ModelFacts
from workers.text import attention, vision
from workers.text.kv_cache import KVShape
from workers.text.linear import pack

log = logging.getLogger(__name__)

Report = Callable[[str, int, int], None]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_DEFAULT_KV_BYTES = 2 * 2**30
_MIN_SLOTS = 4


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        model: the transformers module, in eval mode on its device.
        tokenizer: transformers' tokenizer.
        eos_ids: tokens that end a reply.
        defaults: the model's own sampling defaults.
        kv: the cache's dimensions.
        facts: what the outside may know.
        vision: for models that take images.
    """

    model: Any
    tokenizer: Any
    eos_ids: frozenset[int]
    defaults: dict[str, float]
    kv: KVShape
    facts: ModelFacts
    device: torch.device
    dtype: torch.dtype
    vision: vision.Vision | None = None


def choose_dtype(wanted: str, config_dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return the serving dtype: as wanted; else bfloat16 where the processor multiplies it natively, else float32."""
    if wanted != "auto":
        return _DTYPES[wanted]
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast and config_dtype != torch.float32 else torch.float32
    return config_dtype if config_dtype in (torch.bfloat16, torch.float16) else torch.bfloat16


def load(spec: LoadSpec, report: Report) -> LoadedModel:
    """Load `spec.path`. Blocking: seconds. `report(stage, done_bytes, total_bytes)` tells progress.

    Raises:
        ModelLoadFailed: the directory or the architecture cannot be served; says which.
    """
    path = Path(spec.path)
    device = torch.device(spec.device)
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
    dtype = choose_dtype(spec.dtype, getattr(text, "dtype", None), device)
    total = sum(f.stat().st_size for f in path.glob("*.safetensors"))
    report("read", 0, total)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        options: dict[str, Any] = {
            "config": config,
            "dtype": dtype,
            "trust_remote_code": spec.trust_remote_code,
            "local_files_only": True,
            "use_safetensors": True,
        }
        if vision.is_image_text(config):
            model = vision.load_model(path, attention.NAME, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention.NAME, **options)
    except Exception as error:  # transformers raises anything here: missing weights, truncated files, unknown types
        raise ModelLoadFailed(f"The weights of {spec.model} cannot be loaded: {type(error).__name__}.") from error
    model = model.train(False).requires_grad_(False).to(device)
    report("read", total, total)
    num_parameters = sum(p.numel() for p in model.parameters())
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    pack(model)
    eyes = _open_vision(spec, model, tokenizer, path) if vision.serves_images(config) else None
    kv = _kv_shape(spec, text, dtype, device)
    facts = ModelFacts(
        model=spec.model,
        engine="text",
        architecture=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        max_context_tokens=kv.capacity,
        vocab_size=int(text.vocab_size),
        num_parameters=num_parameters,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=kv.bytes_per_token(dtype),
        supports_images=eyes is not None,
    )
    generation = _generation_config(path)
    eos_ids, defaults = _eos_ids(tokenizer, generation, text), _defaults(generation)
    return LoadedModel(model, tokenizer, eos_ids, defaults, kv, facts, device, dtype, eyes)


def _open_vision(spec: LoadSpec, model: Any, tokenizer: Any, path: Path) -> vision.Vision | None:
    """Return the model's eyes; None, with a warning, if its directory lacks what they need: text is still served."""
    try:
        return vision.Vision(model, tokenizer, path)
    except Exception as error:  # as above: missing files, unknown processors
        log.warning(
            "images not served", extra={"model": spec.model, "reason": f"{type(error).__name__}: {error}"[:300]}
        )
        return None


_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention"}


def _kv_shape(spec: LoadSpec, text: Any, dtype: torch.dtype, device: torch.device) -> KVShape:
    heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    context = int(text.max_position_embeddings)
    if spec.max_context_tokens:
        context = min(context, spec.max_context_tokens)
    layers = int(text.num_hidden_layers)
    per_token = 2 * layers * kv_heads * head_dim * dtype.itemsize
    budget = (spec.kv_cache_bytes or _DEFAULT_KV_BYTES) // per_token
    if budget < 64:
        raise ModelLoadFailed(
            f"{spec.kv_cache_bytes} bytes of KV cache hold only {budget} tokens of {spec.model}; give it at least "
            f"{64 * per_token} (kv_cache in the configuration)."
        )
    capacity, slots = choose_slots(context, budget, spec.max_running, reserves_lazily=device.type == "cpu")
    return KVShape(layers, kv_heads, head_dim, slots, capacity, min(budget, capacity * slots))


def choose_slots(context: int, budget: int, max_running: int, *, reserves_lazily: bool) -> tuple[int, int]:
    """Return (capacity in tokens of one slot, number of slots) for a cache of `budget` tokens.

    Where memory is committed only when written, every slot may be as long as the context. Elsewhere all slots together
    must fit the budget: at least a few of them, so that long contexts do not leave one request alone on the device.
    """
    if reserves_lazily:
        return min(context, budget), max_running
    capacity = min(context, max(1, budget // min(max_running, _MIN_SLOTS)))
    return capacity, max(1, min(max_running, budget // capacity))


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
