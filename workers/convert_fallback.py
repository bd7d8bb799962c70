"""GGUF architectures and vocabularies that our own tables do not know, through transformers. Slow, but wide.

Above it: `workers.convert` and `workers.convert_tokenizer`, which import it only when they need it. Below it: torch
and transformers (GGUF loading as of 5.23).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from workers.convert_config import UnsupportedGguf, eos_token_ids


def convert_with_transformers(
    source: Path, destination: Path, fields: Mapping[str, Any], report: Callable[[int, int], None]
) -> None:
    """Load the whole file with transformers and save it as bf16 safetensors and config.

    Raises:
        UnsupportedGguf: transformers does not know the architecture either.
    """
    try:
        config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
        # from_pretrained(gguf_file=...) would want accelerate, and would keep the weights packed.
        parsed = load_gguf_checkpoint(  # type: ignore[no-untyped-call]
            str(source), return_tensors=True, model_to_load=model, torch_dtype=torch.bfloat16
        )
    except (ValueError, NotImplementedError, KeyError) as error:
        raise UnsupportedGguf(f"architecture {fields.get('general.architecture')!r}: {error}") from error
    missing = set(model.load_state_dict(parsed["tensors"], strict=False).missing_keys)
    if config.get_text_config().tie_word_embeddings:
        model.tie_weights()
        missing -= set(model.all_tied_weights_keys)
    if missing:
        raise UnsupportedGguf(f"it has no tensor for {sorted(missing)[0]!r}")
    if eos := eos_token_ids(fields):
        model.generation_config.eos_token_id = eos
    total = sum(tensor.numel() * 2 for tensor in model.parameters())
    model.save_pretrained(destination, max_shard_size="1000GB")
    report(total, total)


def write_tokenizer_with_transformers(source: Path, destination: Path, fields: Mapping[str, Any]) -> None:
    """Let transformers rebuild the tokenizer, give it the file's own chat template, and save it."""
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    if template := fields.get("tokenizer.chat_template"):
        tokenizer.chat_template = template
    tokenizer.save_pretrained(destination)
