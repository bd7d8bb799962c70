"""Tiny models that make embeddings or rank documents: random weights, the tiny tokenizer, a few hundred kilobytes.

Above: tests of the embedding engine. Below: `tiny.py`, torch, transformers. Built into a directory that the test gives.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.models import tiny

CLS, SEP = 1, 2
"""The tiny tokenizer's `<|im_start|>` and `<|im_end|>`, put around texts as Bert's tokenizers do."""

_SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def tiny_bert(directory: Path) -> Path:
    """Build a Bert encoder without any file of sentence-transformers."""
    from transformers import BertConfig, BertModel

    return _save(directory, BertModel, BertConfig(**_SIZES))


def tiny_cross_encoder(directory: Path, num_labels: int = 1) -> Path:
    """Build a Bert classifier of pairs."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**_SIZES, num_labels=num_labels)
    return _save(directory, BertForSequenceClassification, config)


def _save(directory: Path, kind: Any, config: Any) -> Path:
    import torch

    directory.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.endswith("LayerNorm.weight"):
                    parameter.normal_(0.0, 0.2)
    model.save_pretrained(directory)
    _save_tokenizer(directory)
    return directory


def _save_tokenizer(directory: Path) -> None:
    from tokenizers import processors

    tokenizer = tiny.train_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=[("<|im_start|>", CLS), ("<|im_end|>", SEP)],
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "cls_token": "<|im_start|>",
        "sep_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "model_max_length": 128,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_modules(directory: Path, *steps: tuple[str, dict[str, Any]], **config: Any) -> None:
    """Write `modules.json` for a transformer and then (class name, its config) …, and the model's `config`."""
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for index, (kind, step) in enumerate(steps, start=1):
        path = f"{index}_{kind}"
        modules.append({"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"})
        (directory / path).mkdir(exist_ok=True)
        (directory / path / "config.json").write_text(json.dumps(step), encoding="utf-8")
    (directory / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (directory / "config_sentence_transformers.json").write_text(json.dumps(config), encoding="utf-8")
