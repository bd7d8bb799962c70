"""A step over a model's own weights, in ten launches a layer where its definition takes some fifty.

Above: `graphs.py`, which records decode steps of it. Below: `kernels.py`, `layout.py`, torch's matrix products.

What the model is comes from `describe.py`, as for the CPU's kernels. Weights that are multiplied with the same rows lie
one after the other (queries, keys and values; gate and up), quantized or not, so each is one product; the module's own
become views of them, and nothing exists twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import nn

from workers.text.describe import Description, Layer, NotSupported, describe
from workers.text.gpu.kernels import add_norm, gate, rotate_and_keep
from workers.text.gpu.layout import Layout
from workers.text.linear import QuantizedLinear

log = logging.getLogger(__name__)

Turns = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""Cosines and sines (rows, rotated / 2) for each of a model's ropes."""


class FusedDecoder:
    """What a description describes.

    Args:
        description: what the decoder is.
        decoder: the module, on one device; its layers' weights become views of what is kept here.

    Raises:
        NotSupported: a layer is of another kind.
    """

    def __init__(self, description: Description, decoder: Any) -> None:
        self._d = description
        device = description.head.device
        self._embedding = description.head if description.embedding is None else description.embedding
        self._final_norm = _factor(description.final_norm, description.norm_offset)
        self._frequencies = [(rope.frequencies.to(device), rope.scaling) for rope in description.ropes]
        self._layers: list[_Fused] = []
        for layer, module in zip(description.layers, decoder.layers, strict=True):
            self._layers.append(_Fused(layer, module, description.norm_offset))
            if device.type == "cuda":
                torch.cuda.empty_cache()  # weights lay apart, in pieces too small for the next layer's joined ones

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
            attended = self._attend(index, layer, layer.qkv(normed), turns, layout)
            delta = layer.out(attended)
            normed = add_norm(
                stream, delta, layer.mlp_norm, after=layer.after_attention, eps=d.eps, scale=d.residual_scale
            )
            delta = layer.down(gate(layer.gate_up(normed), gelu=d.gelu))
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
        return FusedDecoder(describe(decoder, head, config), decoder)
    except NotSupported as reason:
        log.info("steps are not fused", extra={"reason": str(reason)})
        return None


class _Fused:
    """A layer: its products, those of the same rows together, and its norms."""

    def __init__(self, layer: Layer, module: Any, norm_offset: float) -> None:
        if layer.router is not None:
            raise NotSupported("layers with experts")
        attention, mlp = module.self_attn, module.mlp
        self.qkv = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = _joined(attention.o_proj)
        self.gate_up, self.down = _joined(mlp.gate_proj, mlp.up_proj), _joined(mlp.down_proj)
        norms = [None if norm is None else _factor(norm, norm_offset) for norm in layer.norms]
        first, self.after_attention, second, self.after_mlp, self.query_norm, self.key_norm = norms
        assert first is not None, "every layer norms what it reads"
        assert second is not None, "twice"
        self.norm, self.mlp_norm = first, second
        self.window = layer.window or None
        self.rope = layer.rope


def _factor(norm: torch.Tensor, offset: float) -> torch.Tensor:
    return norm.detach().float() + offset


def _joined(*linears: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return linear layers as one. Raises NotSupported where they are of different kinds, or of another."""
    first, types = linears[0], {type(linear) for linear in linears}
    biases: list[Any] = [getattr(linear, "bias", None) for linear in linears]
    kinds = {(getattr(one, "four_bits", None), bias is None) for one, bias in zip(linears, biases, strict=True)}
    if len(types) > 1 or len(kinds) > 1 or not types <= {nn.Linear, QuantizedLinear}:
        raise NotSupported(f"linear layers as {', '.join(sorted(one.__name__ for one in types))}")
    if len(linears) == 1:
        return first
    bias = None if biases[0] is None else torch.cat(biases)
    weight = _one_after_the_other(linears, "weight")
    if not isinstance(first, QuantizedLinear):
        return partial(F.linear, weight=weight, bias=bias)
    scales = _one_after_the_other(linears, "scales")
    joined = QuantizedLinear(weight, scales, bias, four_bits=first.four_bits)
    joined.few_rows, joined.most_rows = first.few_rows, first.most_rows
    return joined


def _one_after_the_other(linears: Sequence[nn.Module], name: str) -> torch.Tensor:
    """Return tensors of the layers (outputs, …) as one; each becomes a view of its part."""
    tensors = [getattr(linear, name) for linear in linears]
    joined = torch.cat(tensors)
    for tensor, part in zip(tensors, torch.split(joined, [len(tensor) for tensor in tensors]), strict=True):
        tensor.data = part
    return joined
