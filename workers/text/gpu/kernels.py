"""What lies between a decode step's products, each in one pass over its rows. Triton, for GPUs.

Above: `fused.py`. Below: Triton, which comes with torch's CUDA builds; imported where there is a GPU only.

Such kernels move a few kilobytes, so their number is what costs: written as operators they are some 35 a layer, here
four. Everything is computed in float32 and rounded once, where it is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_GATE_LANES = 1024


def add_norm(
    stream: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    *,
    eps: float,
    after: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Add `scale * delta` to the residual stream, in place; return (rows, width), its RMS norm times `weight`.

    Args:
        stream: (rows, width), contiguous, as `delta`.
        delta: what a block made; None to add nothing.
        weight: (width,) float32.
        after: (width,) float32: `delta` is normed, too, and multiplied by this, before it is added.
    """
    rows, width = stream.shape
    normed = torch.empty_like(stream)
    block = triton.next_power_of_2(width)
    _add_norm[(rows,)](
        stream, stream if delta is None else delta, weight if after is None else after, weight, normed, width, scale,
        eps, HAS_DELTA=delta is not None, HAS_AFTER=after is not None, BLOCK=block,
        num_warps=min(16, max(4, block // 512)),
    )  # fmt: skip
    return normed


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm(  # type: ignore[no-untyped-def]
    stream, delta, after, weight, normed, width, scale, eps,
    HAS_DELTA: tl.constexpr, HAS_AFTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK)
    inside = lanes < width
    here = tl.program_id(0).to(tl.int64) * width + lanes
    value = tl.load(stream + here, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        added = tl.load(delta + here, mask=inside, other=0.0).to(tl.float32)
        if HAS_AFTER:
            factor = tl.load(after + lanes, mask=inside, other=0.0)
            added = added / tl.sqrt(tl.sum(added * added, 0) / width + eps) * factor
        # The norm is of what the stream holds, rounded as it is there.
        kept = (value + scale * added).to(stream.dtype.element_ty)
        tl.store(stream + here, kept, mask=inside)
        value = kept.to(tl.float32)
    factor = tl.load(weight + lanes, mask=inside, other=0.0)
    made = value / tl.sqrt(tl.sum(value * value, 0) / width + eps) * factor
    tl.store(normed + here, made.to(normed.dtype.element_ty), mask=inside)


def rotate_and_keep(
    mixed: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
    *,
    heads: int,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Write a step's keys and values to the cache; return its queries (rows, heads, head_dim).

    Args:
        mixed: (rows, (heads + 2 * kv_heads) * head_dim), contiguous: queries, keys, values of each row.
        keys: (places, kv_heads, head_dim), contiguous, as `values`: a layer's cache.
        places: (rows,) int64, where each row's go.
        cosines: (rows, rotated / 2) float32, as `sines`: position i turns with i + rotated / 2. None to turn nothing.
        query_norm: (head_dim,) float32: each head is normed first and multiplied by this; None for none.
        key_norm: the same for keys.
    """
    rows, (_, kv_heads, head_dim) = mixed.shape[0], keys.shape
    queries = torch.empty((rows, heads, head_dim), dtype=mixed.dtype, device=mixed.device)
    is_normed = query_norm is not None and key_norm is not None
    _rotate_and_keep[(rows, heads + 2 * kv_heads)](
        mixed, queries, keys, values, places,
        mixed if cosines is None else cosines, mixed if sines is None else sines,
        query_norm if is_normed else mixed, key_norm if is_normed else mixed, eps,
        HEADS=heads, KV_HEADS=kv_heads, HEAD=head_dim, WIDTH=triton.next_power_of_2(head_dim),
        HALF=0 if cosines is None else cosines.shape[1], IS_NORMED=is_normed, num_warps=1,
    )  # fmt: skip
    return queries


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_and_keep(  # type: ignore[no-untyped-def]
    mixed, queries, keys, values, places, cosines, sines, query_norm, key_norm, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    IS_NORMED: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lanes = tl.arange(0, WIDTH)
    inside = lanes < HEAD
    own = mixed + (row * (HEADS + 2 * KV_HEADS) + head) * HEAD
    place = tl.load(places + row)
    if head >= HEADS + KV_HEADS:
        there = (place * KV_HEADS + head - HEADS - KV_HEADS) * HEAD + lanes
        tl.store(values + there, tl.load(own + lanes, mask=inside, other=0.0), mask=inside)
    else:
        made = tl.load(own + lanes, mask=inside, other=0.0).to(tl.float32)
        is_query = head < HEADS
        norms = key_norm
        if is_query:
            norms = query_norm
        size = made
        if IS_NORMED:
            size = 1.0 / tl.sqrt(tl.sum(made * made, 0) / HEAD + eps)
            made = made * size * tl.load(norms + lanes, mask=inside, other=0.0)
        if HALF > 0:
            is_turned, is_first = lanes < 2 * HALF, lanes < HALF
            partner = tl.where(is_first, lanes + HALF, lanes - HALF)
            other = tl.load(own + partner, mask=is_turned, other=0.0).to(tl.float32)
            if IS_NORMED:
                other = other * size * tl.load(norms + partner, mask=is_turned, other=0.0)
            angle = row * HALF + tl.where(is_first, lanes, lanes - HALF)
            cosine = tl.load(cosines + angle, mask=is_turned, other=1.0)
            sine = tl.load(sines + angle, mask=is_turned, other=0.0)
            made = made * cosine + tl.where(is_first, -other, other) * sine
        if is_query:
            tl.store(queries + (row * HEADS + head) * HEAD + lanes, made.to(queries.dtype.element_ty), mask=inside)
        else:
            there = (place * KV_HEADS + head - HEADS) * HEAD + lanes
            tl.store(keys + there, made.to(keys.dtype.element_ty), mask=inside)


def gate(mixed: torch.Tensor, *, gelu: bool) -> torch.Tensor:
    """Return (rows, width): the activation of the first half of each row times its second half.

    Args:
        mixed: (rows, 2 * width), contiguous.
        gelu: GELU by its tanh formula, else SiLU.
    """
    rows, width = mixed.shape[0], mixed.shape[1] // 2
    gated = torch.empty((rows, width), dtype=mixed.dtype, device=mixed.device)
    _gate[(rows, triton.cdiv(width, _GATE_LANES))](mixed, gated, width, GELU=gelu, LANES=_GATE_LANES)
    return gated


@triton.jit  # type: ignore[untyped-decorator]
def _gate(mixed, gated, width, GELU: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * LANES + tl.arange(0, LANES)
    inside = lanes < width
    opened = tl.load(mixed + 2 * row * width + lanes, mask=inside, other=0.0).to(tl.float32)
    passed = tl.load(mixed + 2 * row * width + width + lanes, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        # 2 * sqrt(2 / pi); tanh(x) = 2 * sigmoid(2 * x) - 1.
        opened = opened * tl.sigmoid(1.5957691216057308 * (opened + 0.044715 * opened * opened * opened))
    else:
        opened = opened * tl.sigmoid(opened)
    tl.store(gated + row * width + lanes, (opened * passed).to(gated.dtype.element_ty), mask=inside)
