"""Products of a few rows with weights of 8 or 4 bits, widened in registers: a step reads half or a quarter. Triton.

Above: `workers.text.linear.QuantizedLinear`, whose layout this reads. Below: Triton, imported where there is a GPU
only. Many rows are bound by arithmetic instead, and go through widened weights and torch's own product.
"""

from __future__ import annotations

import logging

import torch
import triton
import triton.language as tl
from torch import nn

from workers.text.linear import GROUP, QuantizedLinear

log = logging.getLogger(__name__)

MOST_ROWS = 64
_OUTPUTS = 32
_BYTES = 128
_LEAST_ROWS = 16
# Products of sums in another order, of bfloat16.
_NEAR = 0.02


def product(
    hidden: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, *, four_bits: bool
) -> torch.Tensor:
    """Return `hidden @ weight.T + bias`, (rows, outputs) in the dtype of `hidden`.

    Args:
        hidden: (rows, inputs), at most `MOST_ROWS`, contiguous.
        weight: (outputs, inputs) int8; of four bits (outputs, inputs / 2): even inputs in the lower halves.
        scales: (outputs,) of them; of four bits (outputs, inputs / GROUP).
        bias: (outputs,).
    """
    rows, (outputs, num_bytes) = hidden.shape[0], weight.shape
    made = torch.empty((rows, outputs), dtype=hidden.dtype, device=hidden.device)
    _product[(triton.cdiv(outputs, _OUTPUTS),)](
        hidden, weight, scales, scales if bias is None else bias, made, rows, outputs,
        BYTES=num_bytes, ROWS=max(_LEAST_ROWS, triton.next_power_of_2(rows)), TILE_OUTPUTS=_OUTPUTS, TILE_BYTES=_BYTES,
        GROUP_BYTES=GROUP // 2, FOUR_BITS=four_bits, HAS_BIAS=bias is not None, PRECISE=hidden.dtype == torch.float32,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return made


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    hidden, weight, scales, bias, made, rows, outputs,
    BYTES: tl.constexpr, ROWS: tl.constexpr, TILE_OUTPUTS: tl.constexpr, TILE_BYTES: tl.constexpr,
    GROUP_BYTES: tl.constexpr, FOUR_BITS: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    out = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    row = tl.arange(0, ROWS)
    is_out, is_row = out < outputs, row < rows
    total = tl.zeros((ROWS, TILE_OUTPUTS), tl.float32)
    for start in range(0, BYTES, TILE_BYTES):
        at = start + tl.arange(0, TILE_BYTES)
        is_there = at < BYTES
        inside = is_out[:, None] & is_there[None, :]
        kept = tl.load(weight + out[:, None].to(tl.int64) * BYTES + at[None, :], mask=inside, other=0)
        asked = is_row[:, None] & is_there[None, :]
        if FOUR_BITS:
            groups = BYTES // GROUP_BYTES
            scale = tl.load(scales + out[:, None] * groups + at[None, :] // GROUP_BYTES, mask=inside, other=0.0)
            wide = kept.to(tl.int32)
            low = (((wide << 28) >> 28).to(tl.float32) * scale).to(hidden.dtype.element_ty)
            high = ((wide >> 4).to(tl.float32) * scale).to(hidden.dtype.element_ty)
            even = tl.load(hidden + 2 * (row[:, None] * BYTES + at[None, :]), mask=asked, other=0.0)
            odd = tl.load(hidden + 2 * (row[:, None] * BYTES + at[None, :]) + 1, mask=asked, other=0.0)
            if PRECISE:
                total += tl.dot(even, tl.trans(low), input_precision="ieee")
                total += tl.dot(odd, tl.trans(high), input_precision="ieee")
            else:
                total += tl.dot(even, tl.trans(low))
                total += tl.dot(odd, tl.trans(high))
        else:
            asking = tl.load(hidden + row[:, None] * BYTES + at[None, :], mask=asked, other=0.0)
            if PRECISE:
                total += tl.dot(asking, tl.trans(kept.to(tl.float32)), input_precision="ieee")
            else:
                total += tl.dot(asking, tl.trans(kept.to(hidden.dtype.element_ty)))
    if not FOUR_BITS:
        total *= tl.load(scales + out, mask=is_out, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + out, mask=is_out, other=0.0).to(tl.float32)[None, :]
    there = made + row[:, None] * outputs + out[None, :]
    tl.store(there, total.to(made.dtype.element_ty), mask=is_row[:, None] & is_out[None, :])


def use(model: nn.Module) -> int:
    """Have a model's quantized layers multiply few rows by `product`, if it makes of each kind of them what they do.

    Returns:
        how many do.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    kinds = {(layer.in_features, layer.out_features, layer.four_bits): layer for layer in layers}
    try:
        if not all(map(_agrees, kinds.values())):
            log.warning("quantized layers are widened", extra={"reason": "the kernel's products differ"})
            return 0
    except Exception as reason:  # Triton fails in many ways; widening still serves.
        log.warning("quantized layers are widened", extra={"reason": str(reason)[:500]})
        return 0
    for layer in layers:
        layer.few_rows = product
        layer.most_rows = MOST_ROWS
    return len(layers)


@torch.inference_mode()
def _agrees(layer: QuantizedLinear) -> bool:
    """Whether one layer's products come out alike both ways, for one row, some, and as many as there may be."""
    draws = torch.Generator().manual_seed(0)
    scales = layer.scales
    for rows in (1, 5, MOST_ROWS):
        hidden = torch.randn((rows, layer.in_features), generator=draws).to(scales.device, scales.dtype)
        got = product(hidden, layer.weight, scales, layer.bias, four_bits=layer.four_bits).float()
        expected = layer.widened(hidden).float()
        if not bool((got - expected).norm() <= _NEAR * expected.norm()):
            return False
    return True
