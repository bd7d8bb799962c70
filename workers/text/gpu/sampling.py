"""Tokens chosen where the logits are: a row of them is half a megabyte, a token eight bytes.

Above: `sampler.py`, whose rules and draws these are, for logits on a device. Below: torch. All rows go through the same
few operators, and the host waits once, for all of them. What is wanted can be bounded (the likeliest `_CANDIDATES`);
the rare row that needs more is drawn by `sampler.py` on the host, with the same number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)

from workers.text.sampler import History, RowSampling, apply_mask, draw_from, edit_logits

_BLOCK = 256
_CANDIDATES = 1024

Drawn = tuple[torch.Tensor, torch.Tensor]
"""Token ids (rows,) int64, and whether each is right (rows,) bool: if not, the host must draw."""


@torch.inference_mode()
def sample_there(
    logits: torch.Tensor,
    rules: Sequence[RowSampling],
    histories: Sequence[History],
    masks: Sequence[torch.Tensor | None],
) -> list[int | None]:
    """Choose one token for each row of logits (rows, vocab) on any device; see `workers.text.sampler.sample`."""
    edited = [i for i, rule in enumerate(rules) if rule.edits_logits or masks[i] is not None]
    if edited:
        logits = logits.clone()
    for index in edited:
        edit_logits(logits[index], rules[index], histories[index])
        if (mask := masks[index]) is not None:
            apply_mask(logits[index], mask)
    peaks, tokens = logits.max(dim=-1)
    is_right = torch.ones_like(tokens, dtype=torch.bool)
    random = [i for i, rule in enumerate(rules) if not rule.greedy]
    uniforms = {i: rules[i].draw() for i in random}
    if random:
        chosen = torch.tensor(random, device=logits.device)
        tokens[chosen], is_right[chosen] = draw_all(
            logits[chosen], peaks[chosen], [rules[i] for i in random], list(uniforms.values())
        )
    told = torch.stack((tokens, is_right.long(), peaks.isfinite().long()), dim=1).tolist()
    found: list[int | None] = []
    for index, (token, right, finite) in enumerate(told):
        if not finite:
            found.append(None)
        elif right:
            found.append(token)
        else:
            found.append(draw_from(logits[index].cpu(), float(peaks[index]), rules[index], uniforms[index]))
    return found


def draw_all(rows: torch.Tensor, peaks: torch.Tensor, rules: Sequence[RowSampling], uniforms: Sequence[float]) -> Drawn:
    """Draw a token from each row (rows, vocab) of edited logits, whose highest is `peaks` (rows,); see `Drawn`.

    Args:
        rules: one for each row, none of them greedy.
        uniforms: one number in [0, 1) for each row.
    """
    numbers = [[max(r.temperature, 1e-5), r.top_k, r.top_p, r.min_p, u] for r, u in zip(rules, uniforms, strict=True)]
    told = torch.tensor(numbers, dtype=torch.float64, device=rows.device)
    weights = torch.exp((rows - peaks[:, None]) / told[:, :1].float())
    is_bounded = [0 < r.top_k < rows.shape[1] or r.top_p < 1.0 or r.min_p > 0.0 for r in rules]
    if not any(is_bounded):
        return _draw_free(weights, told[:, 4:])
    if all(is_bounded):
        return _draw_bounded(weights, told)
    tokens = torch.empty(len(rules), dtype=torch.long, device=rows.device)
    is_right = torch.empty(len(rules), dtype=torch.bool, device=rows.device)
    bounded, free = (
        torch.tensor([i for i, b in enumerate(is_bounded) if b is kind], device=rows.device) for kind in (True, False)
    )
    tokens[bounded], is_right[bounded] = _draw_bounded(weights[bounded], told[bounded])
    tokens[free], is_right[free] = _draw_free(weights[free], told[free, 4:])
    return tokens, is_right


def _draw_free(weights: torch.Tensor, uniforms: torch.Tensor) -> Drawn:
    """Draw from all of weights (rows, vocab): first a block of them, then one in it. `uniforms` is (rows, 1)."""
    size = weights.shape[1]
    blocks = F.pad(weights, (0, -size % _BLOCK)).view(len(weights), -1, _BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    wanted = uniforms * ends[:, -1:]
    block = torch.searchsorted(ends, wanted, right=True).clamp(max=ends.shape[1] - 1)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = before + blocks.take_along_dim(block[:, :, None], 1)[:, 0].double().cumsum(-1)
    tokens = block * _BLOCK + torch.searchsorted(inside, wanted, right=True)
    # Rounding may carry a number past the last token that has any weight.
    held = tokens.clamp(max=size - 1)
    return held[:, 0], ((tokens < size) & (weights.gather(1, held) > 0))[:, 0]


def _draw_bounded(weights: torch.Tensor, told: torch.Tensor) -> Drawn:
    """Draw from what top_k, top_p and min_p leave of weights (rows, vocab), the likeliest of which are 1.

    Args:
        told: (rows, 5) float64: temperature, top_k, top_p, min_p, uniform number.
    """
    _, top_k, top_p, min_p, uniforms = (column[:, None] for column in told.T)
    size = weights.shape[1]
    kept, ids = weights.topk(min(_CANDIDATES, size), dim=-1)
    num_kept = kept.shape[1]
    ranks = torch.arange(num_kept, device=weights.device)
    has_limit = (top_k > 0) & (top_k < size)
    most = torch.where(has_limit, top_k.long(), size)
    mass = kept.double().masked_fill(ranks >= most, 0.0).cumsum(-1)
    total = torch.where(has_limit, mass[:, -1:], weights.sum(-1, keepdim=True, dtype=torch.float64))
    nucleus = (mass < top_p * total).sum(-1, keepdim=True) + 1
    most = torch.where(top_p < 1.0, torch.minimum(most, nucleus), most)
    likely = (kept >= min_p.float()).sum(-1, keepdim=True).clamp(min=1)
    # Whether there are more behind the last candidate that would have to be kept.
    is_right = (most <= num_kept) | ((min_p > 0.0) & (likely < num_kept)) | (num_kept == size)
    most = torch.where(min_p > 0.0, torch.minimum(most, likely), most).clamp(max=num_kept)
    ends = kept.double().masked_fill(ranks >= most, 0.0).cumsum(-1)
    at = torch.minimum(torch.searchsorted(ends, uniforms * ends[:, -1:], right=True), most - 1)
    return ids.gather(1, at)[:, 0], (is_right & (kept.gather(1, at) > 0))[:, 0]
