"""How families of code models fill a gap between two texts: a table of their control tokens. Pure; above: `prompts.py`.

The order and spelling are those that the models' own papers and cards give. A model has a format when all of its tokens
are control tokens of its tokenizer; the first match counts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FillFormat:
    """One family's way to ask for what stands between two texts.

    Attributes:
        template: the prompt, with `{prefix}` and `{suffix}` where the texts go.
        tokens: control tokens that the model must have.
        ends: tokens that end a filled gap, beside the model's own; those that it lacks are ignored.
    """

    family: str
    template: str
    tokens: tuple[str, ...]
    ends: tuple[str, ...] = ()

    def render(self, prefix: str, suffix: str) -> str:
        """Return the prompt's text."""
        before, _, rest = self.template.partition("{")
        first, _, rest = rest.partition("}")
        between, _, rest = rest.partition("{")
        _, _, after = rest.partition("}")
        texts = (prefix, suffix) if first == "prefix" else (suffix, prefix)
        return before + texts[0] + between + texts[1] + after

    def end_ids(self, tokenizer: Any) -> frozenset[int]:
        """Return the ids of `ends` in a tokenizer."""
        vocabulary = tokenizer.get_added_vocab()
        return frozenset(int(vocabulary[token]) for token in self.ends if token in vocabulary)


FILL_FORMATS: tuple[FillFormat, ...] = (
    FillFormat(
        "Qwen Coder, CodeGemma",
        "<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>",
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
        ("<|endoftext|>", "<|fim_pad|>", "<|file_sep|>", "<|repo_name|>", "<|file_separator|>"),
    ),
    FillFormat(
        "StarCoder, Granite, Stable Code",
        "<fim_prefix>{prefix}<fim_suffix>{suffix}<fim_middle>",
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ("<|endoftext|>", "<file_sep>", "<fim_pad>"),
    ),
    FillFormat(
        "SantaCoder",
        "<fim-prefix>{prefix}<fim-suffix>{suffix}<fim-middle>",
        ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
        ("<|endoftext|>",),
    ),
    FillFormat(
        "DeepSeek Coder",
        "<｜fim▁begin｜>{prefix}<｜fim▁hole｜>{suffix}<｜fim▁end｜>",
        ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
        ("<｜end▁of▁sentence｜>",),
    ),
    FillFormat(
        "CodeLlama",
        "▁<PRE>{prefix}▁<SUF>{suffix}▁<MID>",
        ("▁<PRE>", "▁<SUF>", "▁<MID>"),
        ("▁<EOT>",),
    ),
    FillFormat("Codestral", "[SUFFIX]{suffix}[PREFIX]{prefix}", ("[SUFFIX]", "[PREFIX]")),
)


def detect_fill_format(control_tokens: Collection[str]) -> FillFormat | None:
    """Return the format of a model with these control tokens; None if it has none."""
    return next((f for f in FILL_FORMATS if all(token in control_tokens for token in f.tokens)), None)
