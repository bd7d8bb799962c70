"""Linear layers that keep their weights otherwise, for models that run through transformers' definition: laid out for
the processor's matrix kernels (oneDNN, bfloat16 on the CPU), or quantized to 8 or 4 bits (any device).

A plain bfloat16 `F.linear` lays its weight out anew inside every call. Doing it once after loading made all
linear layers of SmolLM2-135M together take 26 ms instead of 34 for 1 row and 52 instead of 63 for 16
(2 cores with AVX512-BF16; medians of 12). A packed weight replaces the original, so memory stays the same, but
for a weight that an embedding shares: that one exists twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# The layout is chosen for this many rows; others run with it nearly as fast (measured 1 … 256).
_ROWS_HINT = 16


class PackedLinear(nn.Module):
    """Drop-in for a bias-free or biased `nn.Linear` in inference; input (…, in), output (…, out), bfloat16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self._bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS_HINT)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight, as many as unpacked."""
        return self.in_features * self.out_features * torch.bfloat16.itemsize

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `hidden @ weight.T + bias`."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self._packed, self._bias, "none", [], "")
        return out


def pack(model: Any) -> int:
    """Replace every bfloat16 `nn.Linear` of a CPU model; return how many. No-op where oneDNN has no bfloat16."""
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not has_onednn or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 0
    targets = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16 and child.weight.device.type == "cpu"
    ]
    for parent, name, child in targets:
        setattr(parent, name, PackedLinear(child))
    return len(targets)


class QuantizedLinear(nn.Module):
    """A linear layer with symmetric integer weights; input (…, in), output (…, out) in the input's dtype.

    "int8" has one scale for each output; "int4" one for each 32 inputs of an output, two weights in a byte. Weights are
    widened for every product: this saves memory, not time. Models that our own kernels run gain both.
    """

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._bias = linear.bias
        self._group = 32 if kind == "int4" and linear.in_features % 32 == 0 else linear.in_features
        self._four_bits = self._group == 32 and kind == "int4"
        highest = 7 if self._four_bits else 127
        grouped = linear.weight.detach().float().reshape(self.out_features, -1, self._group)
        scales = grouped.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / highest
        weight = (grouped / scales).round().clamp(-highest, highest).to(torch.int8).reshape(self.out_features, -1)
        if self._four_bits:
            weight = (weight[:, ::2] & 15) | (weight[:, 1::2] << 4)
        self._weight = nn.Buffer(weight.contiguous())
        self._scales = nn.Buffer(scales.to(linear.weight.dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `hidden @ weight.T + bias`."""
        weight: torch.Tensor = self._weight
        if self._four_bits:
            weight = torch.stack(((weight << 4) >> 4, weight >> 4), dim=-1).reshape(self.out_features, -1)
        wide = weight.to(hidden.dtype).reshape(self.out_features, -1, self._group) * self._scales.to(hidden.dtype)
        return nn.functional.linear(hidden, wide.reshape(self.out_features, -1), self._bias)


def quantize(model: Any, kind: str) -> int:
    """Replace every `nn.Linear` of a decoder (without its head) by a quantized one; return the bytes saved."""
    targets = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    for parent, name, child in targets:
        setattr(parent, name, QuantizedLinear(child, kind))
    before = sum(int(linear.weight.nbytes) for _, _, linear in targets)
    return before - sum(int(b.nbytes) for parent, name, _ in targets for b in getattr(parent, name).buffers())
