"""A step over a model's own weights, in ten launches a layer where its definition takes some fifty.

Above: `graphs.py`, which records decode steps of it. Below: `kernels.py`, `layout.py`, torch's matrix products.

What the model is comes from `describe.py`, as for the CPU's kernels. Weights that are multiplied with the same rows lie
one after the other (queries, keys and values; gate and up), so each is one product; the module's own parameters become
views of them, and nothing exists twice.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import nn

from workers.text.describe import Description, Layer, NotSupported, describe
from workers.text.gpu.kernels import add_norm, gate, rotate_and_keep
from workers.text.gpu.layout import Layout

log = logging.getLogger(__name__)

Turns = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""Cosines and sines (rows, rotated / 2) for each of a model's ropes."""


class FusedDecoder:
    """What a description describes.

    Args:
        description: its weights are parameters of one device and one dtype, and become views of what is kept here.
    """

    def __init__(self, description: Description) -> None:
        self._d = description
        device = description.head.device
        self._embedding = description.head if description.embedding is None else description.embedding
        self._final_norm = description.final_norm.to(device)
        self._frequencies = [(rope.frequencies.to(device), rope.scaling) for rope in description.ropes]
        self._layers = [_Fused(layer) for layer in description.layers]

    def __call__(self, tokens: torch.Tensor, layout: Layout, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits (rows, vocab) float32. Writes to the cache.

        Args:
            tokens: (rows,) int64.
            rows: which of them are wanted, int64; None for all.
        """
        d = self._d
        turns = self._turns(layout.positions)
        stream = F.embedding(tokens, self._embedding)
        if d.embed_scale != 1.0:
            stream = stream * d.embed_scale
        delta, after = None, None
        for index, layer in enumerate(self._layers):
            normed = add_norm(stream, delta, layer.norm, after=after, eps=d.eps, scale=d.residual_scale)
            attended = self._attend(index, layer, F.linear(normed, layer.qkv, layer.qkv_bias), turns, layout)
            delta = F.linear(attended, layer.out, layer.out_bias)
            normed = add_norm(
                stream, delta, layer.mlp_norm, after=layer.after_attention, eps=d.eps, scale=d.residual_scale
            )
            delta = F.linear(gate(F.linear(normed, layer.gate_up), gelu=d.gelu), layer.down)
            after = layer.after_mlp
        normed = add_norm(stream, delta, self._final_norm, after=after, eps=d.eps, scale=d.residual_scale)
        logits = F.linear(normed if rows is None else normed[rows], d.head).float()
        return logits if d.logit_scale == 1.0 else logits * d.logit_scale

    def _turns(self, positions: torch.Tensor) -> Turns:
        made = []
        for frequencies, scaling in self._frequencies:
            angles = positions[:, None].float() * frequencies
            made.append((angles.cos() * scaling, angles.sin() * scaling))
        return tuple(made)

    def _attend(self, index: int, layer: _Fused, mixed: torch.Tensor, turns: Turns, layout: Layout) -> torch.Tensor:
        keys, values = layout.cache.layer(index)
        cosines, sines = (None, None) if layer.rope < 0 else turns[layer.rope]
        queries = rotate_and_keep(
            mixed, keys, values, layout.places,
            heads=self._d.heads, cosines=cosines, sines=sines,
            query_norm=layer.query_norm, key_norm=layer.key_norm, eps=self._d.eps,
        )  # fmt: skip
        return layout.read(index, queries, scale=self._d.attention_scale, window=layer.window).flatten(1)


def fuse(decoder: Any, head: Any, config: Any) -> FusedDecoder | None:
    """Return a model's decoder fused, if it can be; see `workers.text.describe.describe`."""
    try:
        if odd := {type(m).__name__ for m in _linears(decoder) if type(m) is not nn.Linear}:
            raise NotSupported(f"weights kept as {', '.join(sorted(odd))}")
        return FusedDecoder(describe(decoder, head, config))
    except NotSupported as reason:
        log.info("decode steps are not fused", extra={"reason": str(reason)})
        return None


def _linears(decoder: Any) -> list[nn.Module]:
    return [m for m in decoder.modules() if hasattr(m, "in_features")]


class _Fused:
    """A layer's weights, those of one product together."""

    def __init__(self, layer: Layer) -> None:
        device = layer.out.device
        self.qkv = _joined(layer.qkv)
        self.qkv_bias = torch.cat(layer.qkv_bias) if layer.qkv_bias else None
        self.out, self.down = layer.out, layer.down
        self.out_bias = layer.out_bias[0] if layer.out_bias else None
        self.gate_up = _joined(layer.gate_up)
        norms = [None if norm is None else norm.to(device) for norm in layer.norms]
        first, self.after_attention, second, self.after_mlp, self.query_norm, self.key_norm = norms
        assert first is not None, "every layer norms what it reads"
        assert second is not None, "twice"
        self.norm, self.mlp_norm = first, second
        self.window = layer.window or None
        self.rope = layer.rope


def _joined(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the weights (outputs, inputs) as one; each becomes a view of its part."""
    joined = torch.cat(list(weights))
    for weight, part in zip(weights, torch.split(joined, [len(weight) for weight in weights]), strict=True):
        weight.data = part
    return joined
