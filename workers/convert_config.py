"""GGUF fields to config.json and generation_config.json, for the llama, qwen2 and qwen3 architectures.

Above it: `workers.convert`. Below it: the `gguf` reader. No torch, no transformers. Field names are those of the
GGUF specification (ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gguf import GGUFReader

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Any of these ends an assistant's turn when the vocabulary has it as a control token.
_END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
_CONTROL = 3
# Llama 3.1 and later; the GGUF carries only the resulting factors.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_ORIGINAL = 1.0, 4.0, 8192


class UnsupportedGguf(Exception):
    """The file is sound, but holds something that we cannot turn into a Hugging Face model."""


def read_fields(reader: GGUFReader) -> dict[str, Any]:
    """Return every metadata field of the file as plain Python values."""
    return {name: field.contents() for name, field in reader.fields.items()}


def _arch_field(fields: Mapping[str, Any], name: str, default: Any = None) -> Any:
    key = f"{fields['general.architecture']}.{name}"
    value = fields.get(key, default)
    if value is None:
        raise UnsupportedGguf(f"field {key!r} is missing")
    return value


def heads(fields: Mapping[str, Any]) -> tuple[int, int]:
    """Return (attention heads, key-value heads)."""
    num_heads = _arch_field(fields, "attention.head_count")
    num_kv_heads = _arch_field(fields, "attention.head_count_kv", num_heads)
    if isinstance(num_heads, list) or isinstance(num_kv_heads, list):
        raise UnsupportedGguf("head counts differ from layer to layer")
    return int(num_heads), int(num_kv_heads)


def eos_token_ids(fields: Mapping[str, Any]) -> list[int]:
    """Return every token that ends a reply, the file's own end-of-sequence token first."""
    found = [fields[key] for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if key in fields]
    kinds = fields.get("tokenizer.ggml.token_type") or []
    for index, token in enumerate(fields.get("tokenizer.ggml.tokens") or []):
        if token in _END_TOKENS and index < len(kinds) and kinds[index] == _CONTROL:
            found.append(index)
    return list(dict.fromkeys(int(token) for token in found))


def _rope_parameters(fields: Mapping[str, Any], head_dim: int, factors: list[float] | None) -> dict[str, Any]:
    theta = float(_arch_field(fields, "rope.freq_base", 10000.0))
    kind = str(_arch_field(fields, "rope.scaling.type", "none"))
    if factors is not None:
        return _llama3_rope(theta, head_dim, factors)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    factor = float(_arch_field(fields, "rope.scaling.factor", 1.0))
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        original = int(_arch_field(fields, "rope.scaling.original_context_length"))
        return {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": factor,
            "original_max_position_embeddings": original,
        }
    raise UnsupportedGguf(f"rope scaling {kind!r} is not known")


def _llama3_rope(theta: float, head_dim: int, factors: list[float]) -> dict[str, Any]:
    """Return the llama3 rope parameters that give `factors`, the divisors of each rotary frequency.

    Raises:
        UnsupportedGguf: no parameters that we know give these factors.
    """
    factor = float(f"{max(factors):.6g}")
    if factor <= 1.0:
        return {"rope_type": "default", "rope_theta": theta}
    expected = []
    for index in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * index / head_dim)
        share = (_LLAMA3_ORIGINAL / wavelength - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
        share = min(1.0, max(0.0, share))
        expected.append(1.0 / ((1 - share) / factor + share))
    if len(expected) != len(factors) or any(abs(a - b) > 1e-3 * b for a, b in zip(factors, expected, strict=True)):
        raise UnsupportedGguf("its rope factors are not those of Llama 3")
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL,
    }


def config_json(
    fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope_factors: list[float] | None
) -> dict[str, Any]:
    """Return config.json.

    Args:
        fields: of the GGUF file.
        shapes: of the output tensors, by Hugging Face name.
        rope_factors: the `rope_freqs.weight` tensor, if the file has one.

    Raises:
        UnsupportedGguf: a missing field, or a variant that we do not know.
    """
    architecture = fields["general.architecture"]
    num_heads, num_kv_heads = heads(fields)
    hidden_size = int(_arch_field(fields, "embedding_length"))
    default_head_dim = _arch_field(fields, "rope.dimension_count", hidden_size // num_heads)
    head_dim = int(_arch_field(fields, "attention.key_length", default_head_dim))
    if int(default_head_dim) != head_dim and f"{architecture}.rope.dimension_count" in fields:
        raise UnsupportedGguf("only a part of each head is rotated")
    if "model.embed_tokens.weight" not in shapes:
        raise UnsupportedGguf("it has no token embeddings")
    eos = eos_token_ids(fields)
    config: dict[str, Any] = {
        "architectures": [_CLASSES[architecture]],
        "model_type": architecture,
        "dtype": "bfloat16",
        "vocab_size": shapes["model.embed_tokens.weight"][0],
        "hidden_size": hidden_size,
        "intermediate_size": int(_arch_field(fields, "feed_forward_length")),
        "num_hidden_layers": int(_arch_field(fields, "block_count")),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": int(_arch_field(fields, "context_length")),
        "rms_norm_eps": float(f"{_arch_field(fields, 'attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": _rope_parameters(fields, head_dim, rope_factors),
        # GGUF leaves the output projection out when it is the embedding itself.
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "attention_bias": False,
        "use_cache": True,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }
    if architecture == "qwen2":
        # Its q, k and v always carry biases; there is no switch.
        del config["attention_bias"]
    if architecture == "llama":
        config["mlp_bias"] = False
    return config


def generation_config_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return generation_config.json: only token ids; a GGUF file carries no sampling advice."""
    values = {
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos_token_ids(fields) or None,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }
    return {key: value for key, value in values.items() if value is not None}
