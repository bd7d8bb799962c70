"""Over how many devices a model can be split, and what each part needs, from its files alone.

Above it: the orchestrator's demand for a model. Below it: `footprint.py`. The worker does the splitting; here stands
what is known of it without importing torch: which families it can cut into even parts, by the names of config.json. A
test holds these lists against transformers and the worker.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from orchestrator.store.footprint import Footprint, read_json

MAX_PARTS = 64

BY_HEADS = frozenset(
    {
        "arcee",
        "cohere",
        "cohere2",
        "ernie4_5",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "granite",
        "helium",
        "llama",
        "ministral",
        "mistral",
        "mixtral",
        "olmo",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "starcoder2",
    }
)
"""Families whose parts have some of the heads each, with their keys and values."""

GATHERED = frozenset({"olmo2", "olmo3", "phi3"})
"""Families whose weights are cut evenly, but whose parts keep the keys and values of all heads."""


@dataclass(frozen=True, slots=True)
class Splitting:
    """How a model can be split over several devices of one kind.

    Attributes:
        counts: every number of parts that divides it evenly, from 2 up.
        kv_copies: for each of these, on how many parts each key and value is kept.
    """

    counts: tuple[int, ...] = ()
    kv_copies: tuple[int, ...] = ()

    @property
    def max_parts(self) -> int:
        """The largest number such that it and every smaller one divide the model evenly; 1 when it cannot be split."""
        most = 1
        while most + 1 in self.counts:
            most += 1
        return most

    def part(self, whole: Footprint, num_parts: int) -> Footprint:
        """Return what one of so many parts needs; `num_parts` is 1 or one of `counts`.

        Weights are shared evenly; what every part keeps besides (norms, a few vectors) is within the estimate's error.
        Each part has activations of its own.
        """
        if num_parts == 1:
            return whole
        copies = self.kv_copies[self.counts.index(num_parts)]
        return replace(
            whole,
            weight_bytes=-(-whole.weight_bytes // num_parts),
            kv_bytes_per_token=-(-whole.kv_bytes_per_token * copies // num_parts),
        )


def splitting(path: Path, kind: Literal["cpu", "cuda"], *, has_adapters: bool = False) -> Splitting:
    """Return how the model in directory `path` can be split over devices of a kind.

    On GPUs what cannot be cut has its layers laid over the devices, so any number up to that of layers will do. Models
    that take images and models with adapters are not split.

    Raises:
        ModelLoadFailed: config.json is missing or damaged.
    """
    return _splitting(read_json(path / "config.json"), kind, has_adapters)


def _splitting(config: dict[str, Any], kind: str, has_adapters: bool) -> Splitting:
    if has_adapters or "text_config" in config or "vision_config" in config:
        return Splitting()
    heads, layers = _count(config, "num_attention_heads"), _count(config, "num_hidden_layers")
    kv_heads = _count(config, "num_key_value_heads") or heads
    family = config.get("model_type")
    copies: dict[int, int] = {}
    for parts in range(2, MAX_PARTS + 1):
        if family in GATHERED:
            copies[parts] = parts
        elif family in BY_HEADS and heads and heads % parts == 0:
            if kv_heads % parts == 0:
                copies[parts] = 1
            elif parts % kv_heads == 0:
                copies[parts] = parts // kv_heads
        if parts not in copies and kind == "cuda" and parts <= layers:
            copies[parts] = 1
    return Splitting(tuple(copies), tuple(copies.values()))


def _count(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
