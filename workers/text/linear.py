"""Linear layers that keep their weights otherwise, for models that run through transformers' definition: laid out for
the processor's matrix kernels (oneDNN, bfloat16 on the CPU), or quantized to 8 or 4 bits (any device).

A plain bfloat16 `F.linear` lays its weight out anew inside every call. Doing it once after loading made all
linear layers of SmolLM2-135M together take 26 ms instead of 34 for 1 row and 52 instead of 63 for 16
(2 cores with AVX512-BF16; medians of 12). A packed weight replaces the original, so memory stays the same, but
for a weight that an embedding shares: that one exists twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

GROUP = 32
"""Inputs that share a scale, of weights of four bits."""

FewRows = Callable[..., torch.Tensor]

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

    "int8" has one scale for each output; "int4" one for each `GROUP` inputs of an output, two weights in a byte. A GPU
    multiplies few rows with them as they are (`gpu/narrow.py`); else they are widened for every product, which saves
    memory, not time. Models that the CPU's kernels run gain both.

    Attributes:
        weight: (out, in) int8, of four bits (out, in / 2): even inputs in the lower halves.
        scales: (out,), of four bits (out, in / GROUP); in the dtype that it was quantized from.
        few_rows: multiplies up to `most_rows` rows; None to widen for all.
    """

    def __init__(
        self, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, *, four_bits: bool
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.shape[1] * (2 if four_bits else 1), weight.shape[0]
        self.four_bits = four_bits
        self.weight = nn.Buffer(weight)
        self.scales = nn.Buffer(scales)
        self.bias = bias
        self.few_rows: FewRows | None = None
        self.most_rows = 0

    @classmethod
    def of(cls, linear: nn.Linear, kind: str) -> QuantizedLinear:
        """Quantize a linear layer. "int4" is int8 where `GROUP` does not divide its inputs."""
        four_bits = kind == "int4" and linear.in_features % GROUP == 0
        highest = 7 if four_bits else 127
        size = GROUP if four_bits else linear.in_features
        grouped = linear.weight.detach().float().view(linear.out_features, -1, size)
        scales = grouped.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / highest
        weight = (grouped / scales).round().clamp(-highest, highest).to(torch.int8).flatten(1)
        if four_bits:
            weight = (weight[:, ::2] & 15) | (weight[:, 1::2] << 4)
        scales = scales[:, :, 0] if four_bits else scales[:, 0, 0]
        return cls(weight.contiguous(), scales.to(linear.weight.dtype).contiguous(), linear.bias, four_bits=four_bits)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `hidden @ weight.T + bias`."""
        rows = hidden.numel() // self.in_features
        if self.few_rows is None or rows > self.most_rows:
            return self.widened(hidden)
        flat = hidden.reshape(rows, self.in_features)
        made = self.few_rows(flat, self.weight, self.scales, self.bias, four_bits=self.four_bits)
        return made.view(*hidden.shape[:-1], self.out_features)

    def widened(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the same by a product with the weights in the input's dtype."""
        weight: torch.Tensor = self.weight
        scales = self.scales.to(hidden.dtype)
        if not self.four_bits:
            return nn.functional.linear(hidden, weight.to(hidden.dtype) * scales[:, None], self.bias)
        halves = torch.stack(((weight << 4) >> 4, weight >> 4), dim=-1).view(self.out_features, -1, GROUP)
        wide = (halves.to(hidden.dtype) * scales[:, :, None]).view(self.out_features, self.in_features)
        return nn.functional.linear(hidden, wide, self.bias)


def quantize(model: Any, kind: str, device: torch.device | None = None) -> int:
    """Replace every `nn.Linear` of a decoder (without its head) by a quantized one; return the bytes saved.

    Args:
        device: where each goes first; None to leave them where they are. One layer at a time is there in full.
    """
    targets = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    saved = 0
    for parent, name in targets:
        linear: nn.Linear = getattr(parent, name)
        if device is not None:
            linear = linear.to(device)
        saved += int(linear.weight.nbytes)
        setattr(parent, name, QuantizedLinear.of(linear, kind))
        saved -= sum(int(buffer.nbytes) for buffer in getattr(parent, name).buffers())
    return saved
