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
    return torch.cat([_pooled(mode, states, counted) for mode in modes], dim=-1)


def _pooled(mode: str, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(len(states), device=states.device)
    if mode == "cls":
        return states[rows, mask.argmax(dim=1)]
    if mode == "lasttoken":
        return states[rows, mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)]
    if mode == "max":
        return states.masked_fill(mask[..., None] == 0, float("-inf")).amax(dim=1)
    weights = mask.float()
    if mode == "weightedmean":
        weights = weights * torch.arange(1, mask.shape[1] + 1, device=mask.device)
    total = weights.sum(dim=1, keepdim=True).clamp(min=1e-9)
    summed = torch.einsum("blw,bl->bw", states, weights)
    return summed / (total.sqrt() if mode == "mean_sqrt_len_tokens" else total)
