"""Hidden states to one vector for each sequence. Pure torch; above: `models.py`. Sequences are padded on the right."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pool(hidden: torch.Tensor, mask: torch.Tensor, modes: Sequence[str], num_skipped: int = 0) -> torch.Tensor:
    """Return (batch, modes * width) float32, the vectors of each mode joined end to end.

    The modes are those of sentence-transformers. Sums are float32 whatever the states are.

    Args:
        hidden: (batch, length, width) last hidden states.
        mask: (batch, length) 1 for tokens, 0 for padding.
        modes: which of `recipe.POOLING_MODES`.
        num_skipped: leading tokens that are left out.
    """
    states = hidden.float()
    counted = mask.clone()
    counted[:, :num_skipped] = 0
    return torch.cat([_POOLS[mode](states, counted) for mode in modes], dim=-1)


def _cls(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return states[torch.arange(len(states)), mask.argmax(dim=1)]


def _last(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
    return states[torch.arange(len(states)), last]


def _max(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return states.masked_fill(mask[..., None] == 0, float("-inf")).amax(dim=1)


def _weighted(states: torch.Tensor, weights: torch.Tensor, root: bool) -> torch.Tensor:
    total = weights.sum(dim=1, keepdim=True).clamp(min=1e-9)
    summed = torch.einsum("blw,bl->bw", states, weights)
    return summed / (total.sqrt() if root else total)


def _by_position(mask: torch.Tensor) -> torch.Tensor:
    return mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)


_POOLS = {
    "cls": _cls,
    "lasttoken": _last,
    "max": _max,
    "mean": lambda states, mask: _weighted(states, mask.float(), root=False),
    "mean_sqrt_len_tokens": lambda states, mask: _weighted(states, mask.float(), root=True),
    "weightedmean": lambda states, mask: _weighted(states, _by_position(mask).float(), root=False),
}
