"""Attention over a paged cache, which is read where it lies. Triton, for GPUs.

Above: `layout.py`. Below: Triton, which comes with torch's CUDA builds; imported where there is a GPU only.

Single rows: a sequence's positions are shared out among `splits` programs, so that a few long sequences fill the card,
too; what each found is joined by its log-sum-exp (flash decoding, Dao et al. 2023). Works of several rows: sixteen rows
and some heads of one key head are a tile, which goes over the sequence once (flash attention, Dao et al. 2022). Grids
depend on shapes alone, lengths are read on the device: a CUDA graph of it serves any lengths. Tables have a width of
their own in each step, for which nothing is compiled anew.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from workers.text.kv_cache import BLOCK_TOKENS

MAX_HEAD_DIM = 256
TILE_QUERIES = 16
_TILE_TOKENS = 64
_MOST_SPLITS = 32
# A product's least rows in Triton.
_LEAST_ROWS = 16
# Of one key head's heads, in one tile: 128 rows with its queries.
_MOST_MEMBERS = 8
_WIDE = 128


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
    output: torch.Tensor,
    *,
    splits: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Write to `output` what each row, the last of its sequence, makes of the cache.

    Args:
        query: (rows, heads, head_dim), contiguous, as `output`.
        keys: (places, kv_heads, head_dim), contiguous, as `values`: a layer's cache.
        tables: (rows or more, blocks) int32, the blocks of each row's sequence.
        positions: (rows,) of each in its sequence; its own key is in the cache already.
        splits: into how many parts each sequence is cut.
        window: how many positions a row sees, itself included; None: all.
        softcap: logits are squashed to ± this.
    """
    rows, heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    parts, weights = output, output
    if splits > 1:
        parts = torch.empty((rows, heads, splits, head_dim), dtype=torch.float32, device=query.device)
        weights = torch.empty((rows, heads, splits), dtype=torch.float32, device=query.device)
    sizes: dict[str, Any] = {"HEAD": head_dim, "WIDTH": triton.next_power_of_2(head_dim), "SPLITS": splits}
    _attend_singles[(rows, kv_heads, splits)](
        query, keys, values, tables, positions, parts, weights, scale, softcap or 0.0, tables.stride(0),
        KV_HEADS=kv_heads, GROUP=group, ROWS=max(_LEAST_ROWS, triton.next_power_of_2(group)), TILE=_TILE_TOKENS,
        BLOCK=BLOCK_TOKENS, WINDOW=window or 0, CAPPED=softcap is not None, PRECISE=query.dtype == torch.float32,
        **sizes, num_stages=_stages(head_dim),
    )  # fmt: skip
    if splits > 1:
        _join[(rows * heads,)](parts, weights, output, **sizes)


def attend_tiles(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    tiles: torch.Tensor,
    output: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Write to `output` what rows of tiles make of the cache, each of its sequence up to itself.

    Args:
        query: (rows, heads, head_dim), contiguous, as `output`: the whole step's.
        tables: (sequences, blocks) int32.
        tiles: (tiles, 4) int32: first row, number of rows up to `TILE_QUERIES`, position of the first row, its row of
            `tables`.
        keys, values, scale, window, softcap: as for `attend_singles`.
    """
    heads, head_dim = query.shape[1:]
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    # Of wide heads half as many at once: more do not fit into the shared memory of cards for workstations.
    members = min(_MOST_MEMBERS if head_dim <= _WIDE else _MOST_MEMBERS // 2, triton.next_power_of_2(group))
    _attend_tiles[(tiles.shape[0], kv_heads * triton.cdiv(group, members))](
        query, keys, values, tables, tiles, output, scale, softcap or 0.0, tables.stride(0),
        KV_HEADS=kv_heads, GROUP=group, MEMBERS=members, QUERIES=TILE_QUERIES, TILE=_TILE_TOKENS, BLOCK=BLOCK_TOKENS,
        HEAD=head_dim, WIDTH=triton.next_power_of_2(head_dim), WINDOW=window or 0, CAPPED=softcap is not None,
        PRECISE=query.dtype == torch.float32, num_stages=_stages(head_dim),
        num_warps=8 if TILE_QUERIES * members * head_dim >= 64 * _WIDE else 4,
    )  # fmt: skip


def _stages(head_dim: int) -> int:
    """Return how many tiles of keys and values are under way at once: as many as fit beside the rest on any card."""
    return 3 if head_dim <= _WIDE else 1


@triton.jit  # type: ignore[untyped-decorator]
def _look_up(  # type: ignore[no-untyped-def]
    asked, keys, values, table, at, is_seen, kv_head, lanes, is_lane, scale, softcap,
    KV_HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Return what queries (rows, width) make of the keys at positions (tile,), and the values there."""
    block = tl.load(table + at // BLOCK, mask=is_seen, other=0).to(tl.int64)
    there = ((block * BLOCK + at % BLOCK) * KV_HEADS + kv_head)[:, None] * HEAD + lanes[None, :]
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
    return logits, value


@triton.jit  # type: ignore[untyped-decorator]
def _take_in(logits, value, highest, total, mixed, PRECISE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the running softmax with another tile of logits (rows, tile), -inf where nothing is seen, in it."""
    higher = tl.maximum(highest, tl.max(logits, 1))
    # A row that has seen nothing yet has nothing to fade.
    anchor = tl.where(higher == float("-inf"), 0.0, higher)
    fading = tl.exp(highest - anchor)
    chances = tl.exp(logits - anchor[:, None])
    if PRECISE:
        mixed = mixed * fading[:, None] + tl.dot(chances, value, input_precision="ieee")
    else:
        mixed = mixed * fading[:, None] + tl.dot(chances.to(value.dtype), value)
    return higher, total * fading + tl.sum(chances, 1), mixed


@triton.jit(do_not_specialize=["table_stride"])  # type: ignore[untyped-decorator]
def _attend_singles(  # type: ignore[no-untyped-def]
    query, keys, values, tables, positions, parts, weights, scale, softcap, table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(positions + row).to(tl.int32) + 1
    first = length * 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    share = tl.cdiv(tl.cdiv(length - first, SPLITS), TILE) * TILE
    begin = first + split * share
    end = tl.minimum(begin + share, length)

    members, lanes = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    is_member, is_lane = members < GROUP, lanes < HEAD
    heads = (row * KV_HEADS + kv_head) * GROUP + members
    mine = is_member[:, None] & is_lane[None, :]
    asked = tl.load(query + heads[:, None] * HEAD + lanes[None, :], mask=mine, other=0.0)

    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(begin, end, TILE):
        at = start + tl.arange(0, TILE)
        is_seen = at < end
        logits, value = _look_up(
            asked, keys, values, tables + row * table_stride, at, is_seen, kv_head, lanes, is_lane, scale, softcap,
            KV_HEADS, HEAD, BLOCK, CAPPED, PRECISE,
        )  # fmt: skip
        logits = tl.where(is_seen[None, :], logits, float("-inf"))
        highest, total, mixed = _take_in(logits, value, highest, total, mixed, PRECISE)

    slot = heads * SPLITS + split
    if SPLITS > 1:
        # A part without positions weighs nothing.
        is_empty = begin >= end
        total = tl.where(is_empty, 1.0, total)
        weight = tl.where(is_empty, float("-inf"), highest + tl.log(total))
        tl.store(weights + slot, weight, mask=is_member)
    found = (mixed / total[:, None]).to(parts.dtype.element_ty)
    tl.store(parts + slot[:, None] * HEAD + lanes[None, :], found, mask=mine)


@triton.jit  # type: ignore[untyped-decorator]
def _join(  # type: ignore[no-untyped-def]
    parts, weights, output, HEAD: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    splits, lanes = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    is_lane = lanes < HEAD
    weight = tl.load(weights + head * SPLITS + splits)
    share = tl.exp(weight - tl.max(weight, 0))
    there = (head * SPLITS + splits[:, None]) * HEAD + lanes[None, :]
    part = tl.load(parts + there, mask=is_lane[None, :], other=0.0)
    joined = tl.sum(part * share[:, None], 0) / tl.sum(share, 0)
    tl.store(output + head * HEAD + lanes, joined.to(output.dtype.element_ty), mask=is_lane)


@triton.jit(do_not_specialize=["table_stride"])  # type: ignore[untyped-decorator]
def _attend_tiles(  # type: ignore[no-untyped-def]
    query, keys, values, tables, tiles, output, scale, softcap, table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr, QUERIES: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    tile, part = tl.program_id(0), tl.program_id(1)
    first, count = tl.load(tiles + 4 * tile).to(tl.int64), tl.load(tiles + 4 * tile + 1)
    position, owner = tl.load(tiles + 4 * tile + 2), tl.load(tiles + 4 * tile + 3).to(tl.int64)
    num_parts: tl.constexpr = tl.cdiv(GROUP, MEMBERS)
    kv_head = part // num_parts

    rows, lanes = tl.arange(0, QUERIES * MEMBERS), tl.arange(0, WIDTH)
    queries, members = rows // MEMBERS, (part % num_parts) * MEMBERS + rows % MEMBERS
    is_lane = lanes < HEAD
    mine = ((queries < count) & (members < GROUP))[:, None] & is_lane[None, :]
    heads = ((first + queries) * KV_HEADS + kv_head) * GROUP + members
    asked = tl.load(query + heads[:, None] * HEAD + lanes[None, :], mask=mine, other=0.0)

    own = position + queries
    end = position + count
    begin = position * 0
    if WINDOW > 0:
        begin = tl.maximum(position - WINDOW + 1, 0)
    highest = tl.full((QUERIES * MEMBERS,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES * MEMBERS,), tl.float32)
    mixed = tl.zeros((QUERIES * MEMBERS, WIDTH), tl.float32)
    for start in range(begin, end, TILE):
        at = start + tl.arange(0, TILE)
        logits, value = _look_up(
            asked, keys, values, tables + owner * table_stride, at, at < end, kv_head, lanes, is_lane, scale, softcap,
            KV_HEADS, HEAD, BLOCK, CAPPED, PRECISE,
        )  # fmt: skip
        is_seen = at[None, :] <= own[:, None]
        if WINDOW > 0:
            is_seen = is_seen & (at[None, :] > own[:, None] - WINDOW)
        logits = tl.where(is_seen, logits, float("-inf"))
        highest, total, mixed = _take_in(logits, value, highest, total, mixed, PRECISE)
    found = (mixed / total[:, None]).to(output.dtype.element_ty)
    tl.store(output + heads[:, None] * HEAD + lanes[None, :], found, mask=mine)
