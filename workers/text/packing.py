"""A step as arrays: its tokens packed in one row, where each stands, and which rows' logits are wanted.

Above: the runners. Below: numpy. Pure. Works of a single token come first, so that a runner may treat them alike.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    scored = [row - work.start for row in work.scored_rows]
    last = work.end - work.start - 1
    return scored + ([last + i for i in range(1 + len(work.draft))] if work.yields_token else [])


def pack(step: Step) -> PackedStep:
    """Return a step's arrays."""
    order = sorted(range(len(step.works)), key=lambda i: step.works[i].num_rows > 1)
    num_rows = sum(work.num_rows for work in step.works)
    tokens, positions = np.empty(num_rows, np.int32), np.empty(num_rows, np.int32)
    sequences = np.empty((len(order), 4), np.int32)
    tables = np.zeros((len(order), max(len(work.sequence.blocks) for work in step.works)), np.int32)
    first_row: dict[int, int] = {}
    row = 0
    for index, at in enumerate(order):
        work = step.works[at]
        known = work.end - work.start
        tokens[row : row + known] = work.sequence.token_ids[work.start : work.end]
        if work.draft:
            tokens[row + known : row + work.num_rows] = work.draft
        positions[row : row + work.num_rows] = np.arange(work.start, work.start + work.num_rows)
        sequences[index] = (row, work.num_rows, work.start, index)
        tables[index, : len(work.sequence.blocks)] = work.sequence.blocks
        first_row[at] = row
        row += work.num_rows
    rows = [first_row[at] + offset for at, work in enumerate(step.works) for offset in _offsets(work)]
    singles = sum(work.num_rows == 1 for work in step.works)
    placed = tuple((first_row[at], step.works[at]) for at in order)
    adapters = np.asarray([work.sequence.adapter for _, work in placed], np.int32)
    return PackedStep(
        tokens=tokens,
        positions=positions,
        sequences=sequences,
        tables=tables,
        logit_rows=np.asarray(rows, np.int32),
        num_singles=singles,
        placed=placed,
        adapters=adapters if (adapters >= 0).any() else None,
    )
