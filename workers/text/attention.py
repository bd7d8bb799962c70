"""Our attention function behind transformers' attention interface.

Every model definition of transformers calls one function with this step's queries, keys and values. Ours
writes the new keys and values to the cache, then attends: all decode rows at once over their slots, and each
prefill chunk over its own. Tokens of a step come packed in one row: first one token for each decoding slot,
then the chunks, so that linear layers run once for everybody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from transformers import AttentionInterface

from workers.text.kv_cache import SlotCache

NAME = "hostler"


@dataclass(frozen=True, slots=True)
class Chunk:
    """One prefill chunk: rows `row … row + length` of the step are tokens `start … start + length` of a slot."""

    row: int
    length: int
    slot: int
    start: int


@dataclass(slots=True)
class StepContext:
    """What attention must know of a step.

    Attributes:
        cache: where keys and values live.
        num_decodes: the first rows, one for each.
        decode_slots: (num_decodes,) int64, ascending.
        decode_positions: (num_decodes,) int64, each token's position.
        span_positions: (span,) int64: the same by slot, 0 for slots below the highest that do not decode.
        length: longest decoding sequence, with its newest token.
        chunks: prefill chunks in row order.
        masks: filled by the first layer, read by the rest.
    """

    cache: SlotCache
    num_decodes: int
    decode_slots: torch.Tensor
    decode_positions: torch.Tensor
    span_positions: torch.Tensor
    length: int
    chunks: tuple[Chunk, ...]
    masks: dict[tuple[str, int | None], torch.Tensor | None]

    def decode_mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """Additive mask (span, 1, 1, length): each slot sees its own tokens; cached for all layers."""
        key = ("decode", window)
        if key not in self.masks:
            columns = torch.arange(self.length, device=self.decode_positions.device)
            last = self.span_positions[:, None]
            visible = columns <= last
            if window is not None:
                visible &= columns > last - window
            if bool(visible.all()):
                self.masks[key] = None
            else:
                mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
                self.masks[key] = mask.masked_fill_(~visible, float("-inf"))[:, None, None, :]
        return self.masks[key]

    def chunk_mask(self, chunk: Chunk, window: int | None) -> torch.Tensor:
        """Boolean mask (1, 1, chunk, start + chunk): causal, perhaps windowed; cached for all layers."""
        key = (f"chunk {chunk.row}", window)
        if key not in self.masks:
            device = self.decode_positions.device
            rows = torch.arange(chunk.start, chunk.start + chunk.length, device=device)[:, None]
            columns = torch.arange(chunk.start + chunk.length, device=device)[None, :]
            visible = columns <= rows
            if window is not None:
                visible &= columns > rows - window
            self.masks[key] = visible[None, None]
        mask = self.masks[key]
        assert mask is not None
        return mask


def _softcapped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float, cap: float
) -> torch.Tensor:
    """Attention with logits squashed to ±cap (Gemma 2), which torch's fused kernels do not have."""
    logits = torch.matmul(query, key.transpose(-1, -2)) * scale
    logits = cap * torch.tanh(logits / cap)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    return torch.matmul(torch.softmax(logits, dim=-1, dtype=torch.float32).to(value.dtype), value)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    step: StepContext | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over the cache; the signature is transformers' attention interface.

    Args:
        module: the layer; its `layer_idx` finds its cache.
        query: (1, heads, rows, head_dim); `key` and `value` (1, kv_heads, rows, head_dim), rotated.
        attention_mask: None always: masks come from `step`.
        step: this step's layout, passed through the model's keyword arguments.

    Returns:
        (1, rows, heads, head_dim) and None. Mutates the cache.
    """
    if step is None:
        raise RuntimeError("the model definition did not pass our step through to its attention layers")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    keys, values = step.cache.keys(layer), step.cache.values(layer)
    heads, rows, head_dim = query.shape[1:]
    kv_heads = key.shape[1]
    group = heads // kv_heads
    scale = head_dim**-0.5 if scaling is None else scaling
    output = query.new_empty((rows, heads, head_dim))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if softcap is not None:
            return _softcapped(q, k, v, mask, scale, softcap)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    n = step.num_decodes
    if n:
        keys[step.decode_slots, :, step.decode_positions] = key[0, :, :n].transpose(0, 1)
        values[step.decode_slots, :, step.decode_positions] = value[0, :, :n].transpose(0, 1)
        # A key head's group of query heads stands where query positions do: no key is ever repeated.
        grouped = query[0, :, :n].transpose(0, 1).reshape(n, kv_heads, group, head_dim)
        span = step.span_positions.shape[0]
        if span > n:
            scattered = grouped.new_zeros((span, kv_heads, group, head_dim))
            scattered[step.decode_slots] = grouped
            grouped = scattered
        k, v = keys[:span, :, : step.length], values[:span, :, : step.length]
        attended = run(grouped, k, v, step.decode_mask(sliding_window, query.dtype)).reshape(span, heads, head_dim)
        output[:n] = attended if span == n else attended[step.decode_slots]
    for chunk in step.chunks:
        end = chunk.start + chunk.length
        here = slice(chunk.row, chunk.row + chunk.length)
        keys[chunk.slot, :, chunk.start : end] = key[0, :, here]
        values[chunk.slot, :, chunk.start : end] = value[0, :, here]
        q = query[:, :, here]
        k = keys[chunk.slot, :, :end].repeat_interleave(group, dim=0)[None]
        v = values[chunk.slot, :, :end].repeat_interleave(group, dim=0)[None]
        if chunk.start == 0 and sliding_window is None and softcap is None:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            attended = run(q, k, v, step.chunk_mask(chunk, sliding_window))
        output[here] = attended[0].transpose(0, 1)
    return output[None], None


AttentionInterface.register(NAME, attend)
