"""How a model's layers are cut for tensor parallelism: transformers' own plan, made right for this number of parts.

Above: `opening.py`, `shard.py`. Below: nothing; pure. The plan of transformers cuts the projections of queries, keys
and values into equal runs of rows, which are whole heads only where the numbers of heads divide. Elsewhere its rules
are replaced: by keys and values that every part computes, or by attention that every part does whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

# What projects to keys, alone or together with queries and values.
_KEYS = ("k_proj", "qkv_proj", "query_key_value")
_WHOLE = "replicate"


class CannotSplit(Exception):
    """This model cannot be cut into so many parts; the message says why, to follow on "…: "."""


class Attention(Enum):
    """What one part does of a layer's attention.

    HEADS: its share of the heads, with their keys and values. QUERIES: its share of the query heads; keys and values
    are computed by every part, and each keeps the one head that its queries look at. WHOLE: all, as do the others.
    """

    HEADS = "heads"
    QUERIES = "query heads"
    WHOLE = "whole"


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """How every layer is cut.

    Attributes:
        num_parts: how many ranks there are.
        attention: what each does of it.
        num_kv_heads: key-value heads that each keeps in its cache.
        overrides: rules instead of transformers' own, by the names of its plan (`layers.*.self_attn.k_proj`).
    """

    num_parts: int
    attention: Attention
    num_kv_heads: int
    overrides: Mapping[str, str] = field(default_factory=dict)

    def kept_heads(self, rank: int, num_kv_heads: int) -> slice:
        """Return which of the key-value heads that a rank computes go into its cache.

        Args:
            num_kv_heads: of the whole model.
        """
        if self.attention is not Attention.QUERIES:
            return slice(None)
        first = rank * num_kv_heads // self.num_parts
        return slice(first, first + 1)


def plan_split(rules: Mapping[str, str] | None, num_heads: int, num_kv_heads: int, num_parts: int) -> SplitPlan:
    """Return how to cut a model, given transformers' rules for its architecture (`config.base_model_tp_plan`).

    Raises:
        CannotSplit: there are no rules, or none that can be made right.
    """
    if not rules:
        raise CannotSplit("transformers has no tensor-parallel plan for this architecture")
    parents = {name.rpartition(".")[0] for name in rules if name.rpartition(".")[2] in _KEYS}
    if len(parents) != 1:
        raise CannotSplit("its attention does not project to keys as others do")
    (parent,) = parents
    attention = {name: rule for name, rule in rules.items() if name.startswith(f"{parent}.")}
    cut = {name.rpartition(".")[2] for name, rule in attention.items() if rule == "colwise"}
    if not cut & set(_KEYS):  # gathered behind its projections, or not cut at all
        return SplitPlan(num_parts, Attention.WHOLE, num_kv_heads)
    if num_heads % num_parts == 0 and num_kv_heads % num_parts == 0:
        return SplitPlan(num_parts, Attention.HEADS, num_kv_heads // num_parts)
    if num_heads % num_parts == 0 and num_parts % num_kv_heads == 0 and {"q_proj", "k_proj", "v_proj"} <= cut:
        shared = {f"{parent}.{name}": _WHOLE for name in ("k_proj", "v_proj")}
        return SplitPlan(num_parts, Attention.QUERIES, 1, shared)
    if len(rules) == len(attention):
        raise CannotSplit(
            f"{num_heads} heads with {num_kv_heads} of keys do not divide by {num_parts}, and nothing else is cut"
        )
    return SplitPlan(num_parts, Attention.WHOLE, num_kv_heads, dict.fromkeys(attention, _WHOLE))
