"""GGUF fields to tokenizer.json and tokenizer_config.json.

Above it: `workers.convert`. Below it: the `tokenizers` library; transformers only for vocabularies whose splitting
rule is not in our table (it knows sentencepiece vocabularies).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_CONTROL, _USER_DEFINED = 3, 4
_BYTE_LEVEL = "gpt2"

# The splitting rules are facts of each model family's published tokenizer.json.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Text that clients must see: marked as control in some files, which would drop it from replies.
_SHOWN_TOKENS = ("tool_call", "tool_response", "think", "tools")


def _split(digits: str) -> Any:
    rule = pre_tokenizers.Split(Regex(_SPLIT.replace("DIGITS", digits)), behavior="isolated")
    return pre_tokenizers.Sequence([rule, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _pre_tokenizer(name: str) -> Any | None:
    """Return the splitting rule that the GGUF's `tokenizer.ggml.pre` means; None if we do not know it."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "gpt-2":
        return byte_level
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if name == "qwen2":
        return _split("")
    if name == "llama-bpe":
        return _split("{1,3}")
    return None


def _is_shown(token: str) -> bool:
    return token.strip("<>/|") in _SHOWN_TOKENS


def byte_level_tokenizer(fields: Mapping[str, Any]) -> Tokenizer | None:
    """Return the byte-level BPE tokenizer that `fields` describe; None if they describe another kind."""
    pre = fields.get("tokenizer.ggml.pre", "")
    rule = _pre_tokenizer(pre)
    if fields.get("tokenizer.ggml.model") != _BYTE_LEVEL or rule is None:
        return None
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    kinds: list[int] = fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = rule
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=kind == _CONTROL and not _is_shown(token), normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    bos = fields.get("tokenizer.ggml.bos_token_id")
    byte_level = processors.ByteLevel(trim_offsets=False)
    if fields.get("tokenizer.ggml.add_bos_token") and bos is not None:
        text = tokens[bos]
        with_bos = processors.TemplateProcessing(
            single=f"{text} $A", pair=f"{text} $A {text}:1 $B:1", special_tokens=[(text, bos)]
        )
        tokenizer.post_processor = processors.Sequence([byte_level, with_bos])
    else:
        tokenizer.post_processor = byte_level
    return tokenizer


def tokenizer_config_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokenizer_config.json: special tokens, the context length and the file's own chat template."""
    tokens = fields["tokenizer.ggml.tokens"]
    architecture = fields["general.architecture"]
    config: dict[str, Any] = {
        # Not the family's own class: some of those rebuild the splitting rule and ignore tokenizer.json.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields.get(f"{architecture}.context_length", 10**6),
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and index < len(tokens):
            config[f"{role}_token"] = tokens[index]
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config


def write_tokenizer(fields: Mapping[str, Any], source: Path, destination: Path) -> None:
    """Write the tokenizer of the GGUF file `source` into `destination`."""
    tokenizer = byte_level_tokenizer(fields)
    if tokenizer is None:
        from workers.convert_fallback import write_tokenizer_with_transformers

        write_tokenizer_with_transformers(source, destination, fields)
        return
    tokenizer.save(str(destination / "tokenizer.json"))
    text = json.dumps(tokenizer_config_json(fields), indent=2, ensure_ascii=False) + "\n"
    (destination / "tokenizer_config.json").write_text(text, encoding="utf-8")
