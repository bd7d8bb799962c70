"""GGUF architectures and vocabularies that our own tables do not know, through transformers. Slow, but wide.

Above it: `workers.convert` and `workers.convert_tokenizer`, which import it only when they need it. Below it: torch
and transformers (GGUF loading as of 5.23).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from workers.convert_config import UnsupportedGguf, eos_token_ids


def convert_with_transformers(
    source: Path, destination: Path, fields: Mapping[str, Any], report: Callable[[int, int], None]
) -> None:
    """Load the whole file with transformers and save it as bf16 safetensors, config and tokenizer.

    Raises:
        UnsupportedGguf: transformers does not know the architecture either.
    """
    try:
        # Without dequantize the weights stay packed and cannot be saved.
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
    except (ValueError, NotImplementedError, KeyError) as error:
        raise UnsupportedGguf(f"architecture {fields.get('general.architecture')!r}: {error}") from error
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    if model.config.get_text_config().tie_word_embeddings:
        # The loader leaves two copies; saved as they are, they would take memory twice.
        model.tie_weights()
    if eos := eos_token_ids(fields):
        model.generation_config.eos_token_id = eos
    total = sum(tensor.numel() * 2 for tensor in model.parameters())
    model.save_pretrained(destination, max_shard_size="1000GB")
    report(total, total)
    write_tokenizer_with_transformers(source, destination, fields)


def write_tokenizer_with_transformers(source: Path, destination: Path, fields: Mapping[str, Any]) -> None:
    """Let transformers rebuild the tokenizer, give it the file's own chat template, and save it."""
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    if template := fields.get("tokenizer.chat_template"):
        tokenizer.chat_template = template
    tokenizer.save_pretrained(destination)
