"""Attention of single rows over a paged cache, in one pass over each sequence's blocks. Triton, for GPUs.

Above: `attention.attend`. Below: Triton, which comes with torch's CUDA builds; imported where there is a GPU only.

A sequence's positions are shared out among `splits` programs, so that a few long sequences fill the card, too; what
each found is joined by its log-sum-exp (flash decoding, Dao et al. 2023). A key head's group of query heads is one
tile. Grids depend on shapes alone, lengths are read on the device: a CUDA graph of it serves any lengths.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from workers.text.kv_cache import BLOCK_TOKENS

MAX_HEAD_DIM = 256
_TILE_TOKENS = 64
_MOST_SPLITS = 32
# A product's least rows in Triton.
_LEAST_ROWS = 16


def splits_for(num_sequences: int, num_kv_heads: int, num_processors: int) -> int:
    """Return into how many parts each sequence is cut, a power of two: the card is to have two programs a processor."""
    wanted = 2 * num_processors / max(1, num_sequences * num_kv_heads)
    return max(1, min(_MOST_SPLITS, 1 << max(0, round(wanted) - 1).bit_length()))


def attend_singles(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    positions: torch.Tensor,
    *,
    splits: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Return (rows, heads, head_dim): what each row, the last of its sequence, makes of the cache.

    Args:
        query: (rows, heads, head_dim).
        keys: (places, kv_heads, head_dim), contiguous, as `values`: a layer's cache.
        tables: (rows, blocks) int32, the blocks of each row's sequence.
        positions: (rows,) of each in its sequence; its own key is in the cache already.
        splits: into how many parts each sequence is cut.
        window: how many positions a row sees, itself included; None: all.
        softcap: logits are squashed to ± this.
    """
    rows, heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    query = query.contiguous()
    output = torch.empty_like(query)
    parts = torch.empty((rows, heads, splits, head_dim), dtype=torch.float32, device=query.device)
    weights = torch.empty((rows, heads, splits), dtype=torch.float32, device=query.device)
    sizes: dict[str, Any] = {"HEAD": head_dim, "WIDTH": triton.next_power_of_2(head_dim), "SPLITS": splits}
    _attend[(rows, kv_heads, splits)](
        query, keys, values, tables, positions, parts, weights, scale, softcap or 0.0, tables.stride(0),
        KV_HEADS=kv_heads, GROUP=group, ROWS=max(_LEAST_ROWS, triton.next_power_of_2(group)),
        TILE=_TILE_TOKENS, BLOCK=BLOCK_TOKENS, WINDOW=window or 0, CAPPED=softcap is not None,
        PRECISE=query.dtype == torch.float32, **sizes,
    )  # fmt: skip
    _join[(rows * heads,)](parts, weights, output, **sizes)
    return output


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    query, keys, values, tables, positions, parts, weights, scale, softcap, table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(positions + row).to(tl.int32) + 1
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    share = tl.cdiv(tl.cdiv(length - first, SPLITS), TILE) * TILE
    begin = first + split * share
    end = tl.minimum(begin + share, length)

    members, lanes = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    is_member, is_lane = members < GROUP, lanes < HEAD
    heads = row * KV_HEADS * GROUP + kv_head * GROUP + members
    mine = is_member[:, None] & is_lane[None, :]
    asked = tl.load(query + heads[:, None] * HEAD + lanes[None, :], mask=mine, other=0.0)

    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(begin, end, TILE):
        at = start + tl.arange(0, TILE)
        is_seen = at < end
        block = tl.load(tables + row * table_stride + at // BLOCK, mask=is_seen, other=0).to(tl.int64)
        place = ((block * BLOCK + at % BLOCK) * KV_HEADS + kv_head) * HEAD
        there = place[:, None] + lanes[None, :]
        inside = is_seen[:, None] & is_lane[None, :]
        key = tl.load(keys + there, mask=inside, other=0.0)
        value = tl.load(values + there, mask=inside, other=0.0)
        if PRECISE:
            logits = tl.dot(asked, tl.trans(key), input_precision="ieee") * scale
        else:
            logits = tl.dot(asked, tl.trans(key)) * scale
        if CAPPED:
            # tanh by exponentials; Triton has none of its own on every backend.
            logits = softcap * (1.0 - 2.0 / (tl.exp(2.0 * logits / softcap) + 1.0))
        logits = tl.where(is_seen[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        fading = tl.exp(highest - higher)
        chances = tl.exp(logits - higher[:, None])
        total = total * fading + tl.sum(chances, 1)
        if PRECISE:
            mixed = mixed * fading[:, None] + tl.dot(chances, value, input_precision="ieee")
        else:
            mixed = mixed * fading[:, None] + tl.dot(chances.to(value.dtype), value)
        highest = higher

    # A part without positions weighs nothing.
    is_empty = begin >= end
    total = tl.where(is_empty, 1.0, total)
    weight = tl.where(is_empty, float("-inf"), highest + tl.log(total))
    slot = heads * SPLITS + split
    tl.store(weights + slot, weight, mask=is_member)
    tl.store(parts + slot[:, None] * HEAD + lanes[None, :], mixed / total[:, None], mask=mine)


@triton.jit  # type: ignore[untyped-decorator]
def _join(  # type: ignore[no-untyped-def]
    parts, weights, output, HEAD: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    splits, lanes = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    is_lane = lanes < HEAD
    weight = tl.load(weights + head * SPLITS + splits)
    share = tl.exp(weight - tl.max(weight, 0))
    there = (head * SPLITS + splits[:, None]) * HEAD + lanes[None, :]
    part = tl.load(parts + there, mask=is_lane[None, :], other=0.0)
    joined = tl.sum(part * share[:, None], 0) / tl.sum(share, 0)
    tl.store(output + head * HEAD + lanes, joined.to(output.dtype.element_ty), mask=is_lane)
