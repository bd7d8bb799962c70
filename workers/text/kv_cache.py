"""Keys and values of the running sequences, in slots.

One tensor holds every layer: (2, layers, slots, kv_heads, capacity, head_dim). Running sequences always
occupy slots 0 … n-1, so that a decode step attends over a plain view without gathering; when one leaves, the
last one moves into its slot. On the CPU the tensor is reserved address space: memory is committed only where
tokens were written, so resident bytes follow use. The budget is counted in tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from mmap import mmap

import torch


@dataclass(frozen=True, slots=True)
class KVShape:
    """The cache's fixed dimensions.

    Attributes:
        num_layers: layers that attend.
        num_kv_heads: key/value heads of each.
        head_dim: size of one head.
        num_slots: most sequences that run at once.
        capacity: most tokens of one sequence.
        budget_tokens: most tokens of all sequences together.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_slots: int
    capacity: int
    budget_tokens: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes that one token occupies over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize


class SlotCache:
    """The cache of one model. Used by the engine's thread only."""

    def __init__(self, shape: KVShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        sizes = (2, shape.num_layers, shape.num_slots, shape.num_kv_heads, shape.capacity, shape.head_dim)
        if device.type == "cpu":
            # A virtual reservation that reads as zeros: a masked value still counts with weight 0, and 0 times what
            # an allocator left there may be NaN.
            self._kv = torch.frombuffer(mmap(-1, prod(sizes) * dtype.itemsize), dtype=dtype).view(sizes)
        else:  # real memory, so the loader keeps all slots within the budget
            self._kv = torch.zeros(sizes, dtype=dtype, device=device)

    def keys(self, layer: int) -> torch.Tensor:
        """Keys of one layer: (slots, kv_heads, capacity, head_dim), a view."""
        return self._kv[0, layer]

    def values(self, layer: int) -> torch.Tensor:
        """Values of one layer: (slots, kv_heads, capacity, head_dim), a view."""
        return self._kv[1, layer]

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Copy one sequence's first `num_tokens` from one slot to another."""
        self._kv[:, :, target, :, :num_tokens] = self._kv[:, :, source, :, :num_tokens]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token occupies."""
        return self.shape.bytes_per_token(self.dtype)
