"""Writes a tiny Hugging Face model as the GGUF file that llama.cpp's converter would write. Tests only."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from safetensors.numpy import load_file

from workers.convert import _LAYER_TENSOR_NAMES, _TENSOR_NAMES

_CONTROL, _NORMAL, _USER_DEFINED = 3, 1, 4


def write_gguf(model: Path, path: Path, *, extra: dict[str, np.ndarray] | None = None) -> Path:
    """Write the fp32 model in directory `model` as the GGUF file `path`, with `extra` tensors."""
    config = json.loads((model / "config.json").read_text())
    architecture = {"mistral": "llama", "gemma3_text": "gemma3"}.get(config["model_type"], config["model_type"])
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta", rope.get("full_attention", {}).get("rope_theta", 10000.0))))
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if architecture == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
    _add_tokenizer(writer, model)
    stems = {hf: gguf for gguf, hf in _TENSOR_NAMES.items()}
    parts = {hf: gguf for gguf, hf in _LAYER_TENSOR_NAMES.items()}
    if architecture == "gemma3":
        parts |= {
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        }
    for name, tensor in load_file(model / "model.safetensors").items():
        values = tensor.astype(np.float32)
        stem, _, kind = name.rpartition(".")
        if stem in stems:
            gguf_name = f"{stems[stem]}.{kind}"
        else:
            _, _, layer, part = stem.split(".", 3)
            gguf_name = f"blk.{layer}.{parts[part]}.{kind}"
        if architecture == "llama" and part_is(gguf_name, "attn_q"):
            values = _permute(values, config["num_attention_heads"])
        elif architecture == "llama" and part_is(gguf_name, "attn_k"):
            values = _permute(values, config["num_key_value_heads"])
        if architecture == "gemma3" and gguf_name.endswith("norm.weight"):
            values = values + 1
        writer.add_tensor(gguf_name, np.ascontiguousarray(values))
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def part_is(gguf_name: str, part: str) -> bool:
    """Return whether a tensor is that part of a layer."""
    return f".{part}." in gguf_name


def _permute(values: np.ndarray, num_heads: int) -> np.ndarray:
    # The halves of each rotary pair side by side, as llama.cpp keeps them.
    rows = values.shape[0]
    return values.reshape(num_heads, 2, rows // num_heads // 2, -1).swapaxes(1, 2).reshape(values.shape)


def _add_tokenizer(writer: GGUFWriter, model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    config = json.loads((model / "tokenizer_config.json").read_text())
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    vocabulary = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    vocabulary |= {index: token["content"] for index, token in added.items()}
    kinds = [
        _NORMAL if index not in added else _CONTROL if added[index]["special"] else _USER_DEFINED
        for index in sorted(vocabulary)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([vocabulary[index] for index in sorted(vocabulary)])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(config["chat_template"])
