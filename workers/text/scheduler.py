"""Who runs in the next step: decode everyone, then prefill the eldest in chunks, within the token budget.

Pure bookkeeping over `Sequence` objects: no tensors, no clock, no threads. The engine's loop is
schedule → run → postprocess; this file is the first word of it.

Invariants:
- running sequences hold slots 0 … n-1, one each;
- tokens held by running sequences never exceed the cache's budget: when a decode would, the youngest running
  sequence is preempted (its cache is dropped, it waits at the front and is prefilled again);
- a sequence that alone would exceed the budget was refused at `add`, so the eldest always makes progress.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from hostler.errors import ContextLengthExceeded, Overloaded

from workers.text.sequence import Sequence

_HEADROOM_TOKENS = 16


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one engine, in sequences and tokens."""

    max_running: int
    max_queued: int
    budget_tokens: int
    max_context_tokens: int
    prefill_chunk_tokens: int


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence's share of a step: its tokens `start … end` (exclusive) go through the model."""

    sequence: Sequence
    start: int
    end: int

    @property
    def yields_token(self) -> bool:
        """Whether this step completes the known tokens, so that its last row gives a new one."""
        return self.end == self.sequence.num_tokens


@dataclass(frozen=True, slots=True)
class Move:
    """The cache must copy `num_tokens` from one slot to another before the step."""

    source: int
    target: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Step:
    """What the model runs next: decode rows in slot order, then prefill chunks. Empty when nothing runs."""

    decodes: tuple[Work, ...]
    prefills: tuple[Work, ...]
    moves: tuple[Move, ...]

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)


class Scheduler:
    """Queues and slots of one engine."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._moves: list[Move] = []

    def check(self, num_prompt_tokens: int, num_queued: int) -> None:
        """Refuse what can never run, or not now.

        Raises:
            ContextLengthExceeded: the prompt leaves no room for a token.
            Overloaded: the queue is full.
        """
        limit = min(self.limits.max_context_tokens, self.limits.budget_tokens)
        if num_prompt_tokens >= limit:
            raise ContextLengthExceeded(
                f"This prompt has {num_prompt_tokens} tokens; the model takes {limit} for prompt and reply together. "
                "Shorten the prompt.",
                param="messages",
            )
        if num_queued >= self.limits.max_queued + self.limits.max_running:
            raise Overloaded(f"{num_queued} requests are already running or queued for this model. Try again later.")

    def add(self, sequence: Sequence) -> None:
        """Queue a checked sequence."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; its slot is free from the next step on."""
        if sequence.slot >= 0:
            self._vacate(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    @property
    def held_tokens(self) -> int:
        """Tokens whose keys and values running sequences hold."""
        return sum(s.num_computed_tokens for s in self.running)

    def schedule(self) -> Step:
        """Decide the next step and admit or preempt as it needs."""
        self._make_room_for_decodes()
        budget = self.limits.prefill_chunk_tokens
        prefills: list[Work] = []
        free_tokens = self.limits.budget_tokens - sum(s.num_tokens + 1 for s in self.running)
        for sequence in self.running:
            if not sequence.is_decoding and budget > 0:
                work = self._chunk(sequence, budget)
                prefills.append(work)
                budget -= work.end - work.start
        while self.waiting and budget > 0 and len(self.running) < self.limits.max_running:
            sequence = self.waiting[0]
            # Headroom, so that whoever is admitted is not preempted a moment later.
            headroom = _HEADROOM_TOKENS * len(self.running)
            if self.running and sequence.num_tokens + 1 + headroom > free_tokens:
                break
            self.waiting.popleft()
            sequence.slot = len(self.running)
            self.running.append(sequence)
            free_tokens -= sequence.num_tokens + 1
            work = self._chunk(sequence, budget)
            prefills.append(work)
            budget -= work.end - work.start
        decodes = tuple(Work(s, s.num_computed_tokens, s.num_tokens) for s in self.running if s.is_decoding)
        moves, self._moves = tuple(self._moves), []
        return Step(decodes, tuple(prefills), moves)

    @staticmethod
    def _chunk(sequence: Sequence, budget: int) -> Work:
        start = sequence.num_computed_tokens
        return Work(sequence, start, min(sequence.num_tokens, start + budget))

    def _make_room_for_decodes(self) -> None:
        """Preempt the youngest until every running sequence may hold one more token."""
        while len(self.running) > 1:
            needed = sum(s.num_tokens + 1 for s in self.running)
            if needed <= self.limits.budget_tokens:
                return
            youngest = max(self.running, key=lambda s: s.serial)
            self._vacate(youngest)
            youngest.num_computed_tokens = 0
            self.waiting.appendleft(youngest)

    def _vacate(self, sequence: Sequence) -> None:
        """Free a slot; the last running sequence moves into it, so that slots stay dense."""
        slot, last = sequence.slot, self.running[-1]
        if last is not sequence:
            self._record_move(last, slot)
            self.running[slot] = last
        self.running.pop()
        sequence.slot = -1

    def _record_move(self, moved: Sequence, target: int) -> None:
        """Note that `moved` goes to slot `target`; earlier moves of the same step stay in order."""
        self._moves.append(Move(moved.slot, target, moved.num_computed_tokens))
        moved.slot = target
