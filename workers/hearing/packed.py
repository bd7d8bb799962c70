"""Linear layers whose weights lie as oneDNN wants them, for decode steps on a CPU. Above: `opening.py`; below: torch.

A step multiplies few rows. Given plain weights oneDNN brings them into its own order on every call, which takes longer
than the product. The operators are those that torch's compiler emits; where a build of torch lacks them, layers stay
as they are.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

log = logging.getLogger(__name__)


class PackedLinear(torch.nn.Module):
    """A bfloat16 linear layer, packed for about `num_rows` rows. Takes and gives (…, in) and (…, out)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, num_rows: int) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._packed: Any = torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)
        self._bias = bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return inputs times weights plus bias."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self._bias, "none", [], "")
        return out


def packed(weight: torch.Tensor, bias: torch.Tensor | None, num_rows: int) -> PackedLinear | None:
    """Return a packed layer that was seen to give the same; None where torch cannot."""
    try:
        with torch.inference_mode():
            layer = PackedLinear(weight, bias, num_rows)
            sample = torch.linspace(-1, 1, 2 * weight.shape[1]).reshape(2, -1).to(weight.dtype)
            same = torch.nn.functional.linear(sample, weight, bias)
            return layer if torch.allclose(layer(sample), same, atol=0.1, rtol=0.05) else None
    except (AttributeError, RuntimeError, NotImplementedError) as reason:
        log.info("linear layers are not packed", extra={"reason": str(reason)[:200]})
        return None


def pack_layers(module: torch.nn.Module, num_rows: int) -> bool:
    """Replace every bfloat16 linear layer within `module` by a packed one; False where torch cannot."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.Linear) and child.weight.dtype == torch.bfloat16:
                layer = packed(child.weight, child.bias, num_rows)
                if layer is None:
                    return False
                setattr(parent, name, layer)
    return True
