"""From logits to one token for each row, every row by its own rules.

Greedy rows cost one argmax for all. Random rows draw by inverse transform from one uniform number of the
request's own counter-based generator (Philox, Salmon et al. 2011), so a seed gives the same draws whatever
else is in the batch. Nucleus and min-p sort only the tokens that can be kept at all, a few hundred of a vocabulary.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from workers.engine import SamplingParams

log = logging.getLogger(__name__)

_BLOCK = 256


@dataclass(slots=True)
class RowSampling:
    """Resolved rules of one request, plus its generator (advanced by one draw a token).

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and penalties 0 (repetition 1) are off.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    _random: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        seed = secrets.randbits(64) if self.seed is None else self.seed & (2**64 - 1)
        self._random = np.random.Generator(np.random.Philox(key=seed))

    def draw(self) -> float:
        """Return the next uniform number in [0, 1)."""
        return float(self._random.random())

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0

    @property
    def edits_logits(self) -> bool:
        """Whether anything changes the logits before they become probabilities."""
        return bool(
            self.logit_bias or self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0
        )


def row_rules(wanted: SamplingParams, defaults: Mapping[str, float]) -> RowSampling:
    """Return the rules of one request: as asked, else the model's own default, else the neutral value."""

    def first(value: float | None, name: str, neutral: float) -> float:
        return value if value is not None else defaults.get(name, neutral)

    repetition = wanted.repetition_penalty
    return RowSampling(
        temperature=first(wanted.temperature, "temperature", 1.0),
        top_p=first(wanted.top_p, "top_p", 1.0),
        top_k=int(first(wanted.top_k, "top_k", 0)),
        min_p=first(wanted.min_p, "min_p", 0.0),
        frequency_penalty=wanted.frequency_penalty,
        presence_penalty=wanted.presence_penalty,
        repetition_penalty=repetition if repetition != 1.0 else defaults.get("repetition_penalty", 1.0),
        logit_bias=wanted.logit_bias,
        seed=wanted.seed,
    )


@dataclass(frozen=True, slots=True)
class History:
    """Tokens that penalties look at: prompt ids and the counts of generated ids."""

    prompt_ids: Sequence[int]
    generated: Counter[int]


def edit_logits(row: torch.Tensor, rules: RowSampling, history: History) -> None:
    """Apply repetition, frequency and presence penalties and logit_bias to one row (vocab,), in place.

    Order and formulas: repetition penalty as CTRL has it (arXiv:1909.05858, section 4.1) over prompt and output;
    frequency and presence as OpenAI documents them, over the output only; the bias last.
    """
    vocab_size = row.shape[0]
    if rules.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*history.prompt_ids, *history.generated}), dtype=torch.long, device=row.device)
        values = row[seen]
        penalty = rules.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (rules.frequency_penalty or rules.presence_penalty) and history.generated:
        ids = torch.tensor(list(history.generated.keys()), dtype=torch.long, device=row.device)
        counts = torch.tensor(list(history.generated.values()), dtype=row.dtype, device=row.device)
        row[ids] -= rules.frequency_penalty * counts + rules.presence_penalty
    if rules.logit_bias:
        pairs = [(i, b) for i, b in rules.logit_bias.items() if i < vocab_size]
        ids = torch.tensor([i for i, _ in pairs], dtype=torch.long, device=row.device)
        row[ids] += torch.tensor([b for _, b in pairs], dtype=row.dtype, device=row.device)


def apply_mask(row: torch.Tensor, allowed: torch.Tensor) -> None:
    """Leave only the `allowed` (vocab,) tokens of a row (vocab,), in place; NaN stays, so that the row still fails."""
    row.masked_fill_(~(allowed.to(row.device) | row.isnan()), -math.inf)


@torch.inference_mode()
def sample(
    logits: torch.Tensor,
    rules: Sequence[RowSampling],
    histories: Sequence[History],
    masks: Sequence[torch.Tensor | None] | None = None,
) -> list[int | None]:
    """Choose one token for each row.

    Args:
        logits: (rows, vocab) float32, left as they are.
        rules: one for each row.
        histories: one for each row.
        masks: for each row (vocab,) bool, the tokens that may be chosen, or None for all; absent: all rows are free.

    Returns:
        Token ids; None for a row whose logits hold NaN or no finite value (that request must fail, alone).
    """
    if logits.device.type != "cpu":
        from workers.text.gpu.sampling import sample_there

        return sample_there(logits, rules, histories, masks or [None] * len(rules))
    values = logits.numpy()  # whose argmax takes a fourth of torch's time; it stops at a NaN
    likeliest = values.argmax(axis=-1)
    peaks = values[np.arange(len(values)), likeliest]
    tokens: list[int | None] = list(likeliest.tolist())
    for index, (rule, peak) in enumerate(zip(rules, peaks.tolist(), strict=True)):
        row = logits[index]
        mask = None if masks is None else masks[index]
        if rule.edits_logits or mask is not None:
            row = row.clone()
            edit_logits(row, rule, histories[index])
            if mask is not None:
                apply_mask(row, mask)
            highest, at = row.max(dim=-1)
            peak, tokens[index] = float(highest), int(at)
        if not math.isfinite(peak):
            tokens[index] = None
        elif not rule.greedy:
            tokens[index] = draw_from(row, peak, rule, rule.draw())
    return tokens


def sample_each(
    logits: torch.Tensor,
    rules: Sequence[RowSampling],
    histories: Sequence[History],
    masks: Sequence[torch.Tensor | None] | None = None,
) -> list[int | None]:
    """Like `sample`, but a row that raises becomes None: only its own request fails."""
    tokens: list[int | None] = []
    for index, (rule, history) in enumerate(zip(rules, histories, strict=True)):
        try:
            tokens += sample(logits[index : index + 1], [rule], [history], masks and [masks[index]])
        except Exception:
            log.exception("sampling failed", extra={"row": index})
            tokens.append(None)
    return tokens


def draw_from(row: torch.Tensor, peak: float, rules: RowSampling, uniform: float) -> int:
    """Draw one token from a row (vocab,) of edited logits on the CPU whose highest is `peak`.

    Args:
        uniform: a number in [0, 1).
    """
    weights = np.exp((row.numpy() - np.float32(peak)) / np.float32(max(rules.temperature, 1e-5)))
    size = weights.shape[0]
    if 0 < rules.top_k < size:
        ids = np.argpartition(weights, size - rules.top_k)[size - rules.top_k :]
    elif rules.top_p >= 1.0 and rules.min_p <= 0.0:
        return _inverse_transform(weights, uniform)
    else:
        # What lies below `least` cannot be kept: all of it together is less than what top_p may leave out, or each is
        # less than min_p allows. The likeliest token has weight 1.
        least = (1.0 - rules.top_p) / size * float(weights.sum(dtype=np.float64)) if rules.top_p < 1.0 else 0.0
        ids = np.flatnonzero(weights >= min(1.0, max(least, rules.min_p)))
    kept = weights[ids]
    order = np.argsort(-kept, kind="stable")
    ids, kept = ids[order], kept[order]
    keep = kept.shape[0]
    if rules.top_p < 1.0:
        # The smallest set whose probability reaches top_p; of what top_k left, as the filters compose in order.
        total = float((kept if rules.top_k else weights).sum(dtype=np.float64))
        keep = min(keep, int((np.cumsum(kept, dtype=np.float64) < rules.top_p * total).sum()) + 1)
    if rules.min_p > 0.0:
        keep = min(keep, max(1, int((kept >= rules.min_p).sum())))
    return int(ids[_inverse_transform(kept[:keep], uniform)])


def _inverse_transform(weights: npt.NDArray[np.float32], uniform: float) -> int:
    """Return the index drawn with probability proportional to `weights` (n,) for a uniform number in [0, 1).

    Sums of blocks first, then within the block that the number falls in: a running sum over a whole vocabulary costs
    more than everything else here.
    """
    size = weights.shape[0]
    blocks = np.add.reduceat(weights, np.arange(0, size, _BLOCK), dtype=np.float64)
    ends = np.cumsum(blocks)
    wanted = uniform * float(ends[-1])
    block = min(int(np.searchsorted(ends, wanted, side="right")), blocks.shape[0] - 1)
    start = block * _BLOCK
    before = float(ends[block - 1]) if block else 0.0
    inside = before + np.cumsum(weights[start : start + _BLOCK], dtype=np.float64)
    index = start + int(np.searchsorted(inside, wanted, side="right"))
    if index >= size or weights[index] == 0.0:  # rounding carried the number past the last token that has any weight
        index = int(np.flatnonzero(weights)[-1])
    return int(index)


@torch.inference_mode()
def prompt_logprobs(
    rows: torch.Tensor, token_ids: Sequence[int], num_top: int
) -> list[tuple[float, list[tuple[int, float]]]]:
    """Return for each row (n, vocab) what `logprobs` returns for its token, all at once."""
    log_probabilities = torch.log_softmax(rows, dim=-1)
    chosen = log_probabilities.gather(1, torch.tensor(token_ids, device=rows.device)[:, None])[:, 0].tolist()
    if not num_top:
        return [(value, []) for value in chosen]
    values, ids = torch.topk(log_probabilities, min(num_top, rows.shape[1]), dim=-1)
    tops = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return list(zip(chosen, tops, strict=True))


def logprobs(row: torch.Tensor, token_id: int, num_top: int) -> tuple[float, list[tuple[int, float]]]:
    """Return the chosen token's log-probability and the `num_top` likeliest (id, log-probability) of a row (vocab,)."""
    log_probabilities = torch.log_softmax(row, dim=-1)
    top: list[tuple[int, float]] = []
    if num_top:
        values, ids = torch.topk(log_probabilities, min(num_top, row.shape[0]))
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
    return float(log_probabilities[token_id]), top
