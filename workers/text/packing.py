"""A step as arrays: its tokens packed in one row, where each stands, and which rows' logits are wanted.

Above: the runners. Below: numpy. Pure. Works of a single token come first, so that a runner may treat them alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from workers.text.scheduler import Step, Work

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PackedStep:
    """What a runner needs of a step.

    Attributes:
        tokens: (rows,) ids, those of one work together.
        positions: (rows,) of each in its sequence.
        sequences: (works, 4): first row, number of rows, position of the first row, its row of `tables`.
        tables: (works, most blocks) block indices of each sequence, in order, padded with 0.
        logit_rows: (wanted,) rows whose logits are wanted, in the order of the step's works.
        num_singles: leading works of one row.
        placed: each work and its first row.
        adapters: (works,) which adapter each sequence runs with, -1 for none; None when none of them has any.
    """

    tokens: Ints
    positions: Ints
    sequences: Ints
    tables: Ints
    logit_rows: Ints
    num_singles: int
    placed: tuple[tuple[int, Work], ...] = ()
    adapters: Ints | None = None


def wanted_rows(work: Work) -> int:
    """Return how many rows of logits a work gives: those that score its prompt, then one a token it may yield."""
    return len(work.scored_rows) + (1 + len(work.draft) if work.yields_token else 0)


def _offsets(work: Work) -> list[int]:
    """Return which of a work's rows those are."""
    if work.num_rows == 1 and not work.sequence.request.echo_logprobs:
        return [0] if work.yields_token else []
    scored = [row - work.start for row in work.scored_rows]
    last = work.end - work.start - 1
    return scored + ([last + i for i in range(1 + len(work.draft))] if work.yields_token else [])


def pack(step: Step) -> PackedStep:
    """Return a step's arrays."""
    works = step.works
    sizes = [work.num_rows for work in works]
    order = sorted(range(len(works)), key=lambda i: sizes[i] > 1)
    tokens: list[int] = []
    starts, firsts, tables = [], [0] * len(works), []
    for at in order:
        work = works[at]
        sequence = work.sequence
        firsts[at] = len(tokens)
        starts.append(work.start)
        if sizes[at] == 1:
            tokens.append(sequence.token_ids[work.start])
        else:
            tokens += sequence.token_ids[work.start : work.end]
            tokens += work.draft
        tables.append(sequence.blocks)
    lengths = [sizes[at] for at in order]
    rows = [firsts[at] + offset for at, work in enumerate(works) for offset in _offsets(work)]
    adapters = [works[at].sequence.adapter for at in order]
    first_rows = np.cumsum([0, *lengths[:-1]])
    positions = np.arange(len(tokens)) + np.repeat(np.asarray(starts) - first_rows, lengths)
    return PackedStep(
        tokens=np.asarray(tokens, np.int32),
        positions=positions.astype(np.int32),
        sequences=np.stack([first_rows, lengths, starts, np.arange(len(works))], axis=1).astype(np.int32),
        tables=_padded(tables),
        logit_rows=np.asarray(rows, np.int32),
        num_singles=sizes.count(1),
        placed=tuple((firsts[at], works[at]) for at in order),
        adapters=np.asarray(adapters, np.int32) if max(adapters) >= 0 else None,
    )


def _padded(rows: list[list[int]]) -> Ints:
    """Return lists of blocks as rows of one array, with zeros behind them."""
    lengths = [len(row) for row in rows]
    table = np.zeros((len(rows), max(lengths)), np.int32)
    table[np.arange(table.shape[1]) < np.asarray(lengths)[:, None]] = np.fromiter(
        chain.from_iterable(rows), np.int32, sum(lengths)
    )
    return table
