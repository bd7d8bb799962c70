"""Who runs in the next step: decode everyone, then prefill the eldest in chunks, as far as the pace allows.

Nobody's prompt is begun beside others' if it would have to be cut although a step could hold it whole: they would wait
longer for their first tokens, and it would have its own no sooner. Nor if it goes on, where the cache ends, with what
the same step computes for somebody else: in the next it finds that there.

Bookkeeping over `Sequence` objects and cache blocks: no tensors, no clock, no threads. The engine's loop is
schedule → run → postprocess; this file is the first word of it.

Invariants:
- a sequence holds the blocks of its computed tokens, and of what the next step computes;
- when a decode finds no block, the youngest running sequence is preempted (its blocks go, it waits at the front and is
  prefilled again, mostly from blocks that are still known);
- a sequence that alone would not fit was refused at `check`, so the eldest always makes progress.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice

from hostler.errors import ContextLengthExceeded, Overloaded

from workers.text.kv_cache import BLOCK_TOKENS, BlockPool, blocks_for
from workers.text.pace import Pace
from workers.text.sequence import Sequence

# Each row of a scored prompt brings a row of logits, up to a megabyte.
_MOST_SCORED_ROWS = 64


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one engine, in sequences and tokens."""

    max_running: int
    max_queued: int
    max_context_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One sequence's share of a step: its tokens `start … end` (exclusive) go through the model, then `draft`.

    Attributes:
        draft: guessed tokens after the last known one; each is checked by the row before it.
    """

    sequence: Sequence
    start: int
    end: int
    draft: tuple[int, ...] = ()

    @property
    def yields_token(self) -> bool:
        """Whether this step completes the known tokens, so that its last rows give new ones."""
        return self.end == self.sequence.num_tokens

    @property
    def num_rows(self) -> int:
        """Tokens that go through the model."""
        return self.end - self.start + len(self.draft)

    @property
    def scored_rows(self) -> range:
        """Which of its tokens give logits that score the prompt; they stand right before those that yield tokens."""
        return self.sequence.scored_rows(self.start, self.end)


@dataclass(frozen=True, slots=True)
class Step:
    """What the model runs next: decodes, then prefill chunks. Empty when nothing runs."""

    works: tuple[Work, ...] = ()
    num_decodes: int = 0

    def __bool__(self) -> bool:
        return bool(self.works)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of prefill chunks."""
        return sum(work.num_rows for work in self.works[self.num_decodes :])


class Scheduler:
    """Queues and cache blocks of one engine."""

    def __init__(self, limits: SchedulerLimits, pool: BlockPool, pace: Pace) -> None:
        self.limits = limits
        self.pool = pool
        self.pace = pace
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._num_steps = 0

    @property
    def longest_tokens(self) -> int:
        """Most tokens of one sequence, prompt and reply together."""
        return min(self.limits.max_context_tokens, self.pool.num_blocks * BLOCK_TOKENS)

    def check(self, num_prompt_tokens: int, num_queued: int) -> None:
        """Refuse what can never run, or not now.

        Raises:
            ContextLengthExceeded: the prompt leaves no room for a token.
            Overloaded: the queue is full.
        """
        if num_prompt_tokens >= self.longest_tokens:
            raise ContextLengthExceeded(
                f"This prompt has {num_prompt_tokens} tokens; the model takes {self.longest_tokens} for prompt and "
                "reply together. Shorten the prompt.",
                param="messages",
            ).counted(num_prompt_tokens, self.longest_tokens)
        if num_queued >= self.limits.max_queued + self.limits.max_running:
            raise Overloaded(f"{num_queued} requests are already running or queued for this model. Try again later.")

    def add(self, sequence: Sequence) -> None:
        """Queue a checked sequence: one that people wait for goes before all that may wait and have not run yet."""
        place = len(self.waiting)
        if not sequence.request.batch:
            while place and self.waiting[place - 1].request.batch and not self.waiting[place - 1].num_generated_tokens:
                place -= 1
        self.waiting.insert(place, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; its blocks are free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def preempt_all(self) -> None:
        """Send every running sequence back to the queue, in order: the cache is about to lose its contents."""
        for sequence in sorted(self.running, key=lambda s: s.serial, reverse=True):
            self._preempt(sequence)
        self.pool.clear()

    def resize(self, num_blocks: int) -> dict[int, int]:
        """Have so many cache blocks, but no fewer than running requests hold, or than any may come to need alone.

        Returns:
            Where the contents of each block that stays must be from now on; see `BlockPool.resize`.
        """
        needed = max(
            (blocks_for(s.num_prompt_tokens + s.max_tokens) for s in (*self.running, *self.waiting)), default=0
        )
        kept = self.pool.resize(max(num_blocks, needed))
        for sequence in self.running:
            sequence.blocks = [kept[block] for block in sequence.blocks]
        return kept

    def fits(self, sequence: Sequence) -> bool:
        """Whether the whole cache would hold a sequence to its end."""
        return sequence.num_prompt_tokens + sequence.max_tokens <= self.longest_tokens

    def schedule(self) -> Step:
        """Decide the next step and admit or preempt as it needs."""
        step = self._next()
        while not step and self.running:
            # Prompts that hold blocks and wait for more: the youngest makes way, so that the eldest goes on.
            self._preempt(max(self.running, key=lambda s: s.serial))
            step = self._next()
        return step

    def _next(self) -> Step:
        self._num_steps += 1
        decodes = self._decodes()
        prefilling = [s for s in self.running if not s.is_decoding]
        places = self.limits.max_running - len(self.running)
        newcomers = (*prefilling, *islice(self.waiting, places))
        left = budget = self._budget([work.sequence for work in decodes], newcomers)
        prefills: list[Work] = []
        coming: set[bytes] = set()
        for number, sequence in enumerate(newcomers):
            is_new = number >= len(prefilling)
            hashes = self._reusable(sequence) if is_new else []
            found = self.pool.match(hashes)
            known = len(found) * BLOCK_TOKENS if is_new else sequence.num_computed_tokens
            if left <= 0 or (prefills and left < sequence.num_tokens - known <= budget):
                break
            if is_new:
                if len(found) < len(hashes) and hashes[len(found)] in coming:
                    continue
                if not self._admit(sequence, found):
                    break
                self.waiting.remove(sequence)
                self.running.append(sequence)
            if (work := self._chunk(sequence, left)) is not None:
                prefills.append(work)
                left -= work.num_rows
                coming.update(self._hashes(work))
        return Step((*decodes, *prefills), len(decodes))

    def _budget(self, decoding: list[Sequence], newcomers: tuple[Sequence, ...]) -> int:
        """Return how many prompt tokens the next step may take, and note who is here since when."""
        for sequence in newcomers:
            sequence.eligible_step = sequence.eligible_step or self._num_steps
        for sequence in decoding:
            sequence.decoding_step = sequence.decoding_step or self._num_steps
        if not newcomers:
            return 0
        eldest = min(s.eligible_step for s in newcomers)
        num_older = sum(s.decoding_step <= eldest for s in decoding)
        return self.pace.chunk_tokens(len(decoding), len(newcomers), num_older)

    def computed(self, work: Work, num_accepted: int) -> None:
        """Note that a work's tokens (and so many of its draft) are in the cache, and make full blocks known."""
        sequence = work.sequence
        sequence.num_computed_tokens = work.end + num_accepted
        first, full = work.start // BLOCK_TOKENS, sequence.num_computed_tokens // BLOCK_TOKENS
        if full > first:
            hashes = sequence.hashes.of(sequence.token_ids, full)
            for index in range(first, full):
                self.pool.publish(sequence.blocks[index], hashes[index])

    @staticmethod
    def _hashes(work: Work) -> list[bytes]:
        """Return the hashes of the blocks that a prompt's chunk fills."""
        full = work.end // BLOCK_TOKENS
        return work.sequence.hashes.of(work.sequence.token_ids, full)[work.start // BLOCK_TOKENS :]

    def _decodes(self) -> list[Work]:
        """Give every decoding sequence a block for its newest token; preempt the youngest until all have one."""
        decodes: list[Work] = []
        for sequence in sorted((s for s in self.running if s.is_decoding), key=lambda s: s.serial):
            while sequence.blocks and not self._grow(sequence, sequence.num_tokens):
                self._preempt(max(self.running, key=lambda s: s.serial))
            if not sequence.blocks:
                continue  # it was the youngest itself
            draft = sequence.draft
            while draft and not self._grow(sequence, sequence.num_tokens + len(draft)):
                draft = draft[:-1]
            decodes.append(Work(sequence, sequence.num_computed_tokens, sequence.num_tokens, draft))
        return decodes

    def _chunk(self, sequence: Sequence, budget: int) -> Work | None:
        start = sequence.num_computed_tokens
        end = min(sequence.num_tokens, start + budget)
        if sequence.scored_rows(start, end):
            end = min(end, start + _MOST_SCORED_ROWS)
        if not self._grow(sequence, end):
            # Others grew into the room that was there at admission; as many tokens as still fit, or wait.
            end = min(end, len(sequence.blocks) * BLOCK_TOKENS)
            if end <= start:
                return None
        return Work(sequence, start, end)

    @staticmethod
    def _reusable(sequence: Sequence) -> list[bytes]:
        """Return the hashes of the blocks at the beginning of a waiting sequence that need not be computed if known."""
        return sequence.hashes.of(sequence.token_ids, sequence.num_reusable_tokens // BLOCK_TOKENS)

    def _admit(self, sequence: Sequence, found: list[int]) -> bool:
        """Take over what was found of a waiting sequence's prompt, if the rest of it would fit, too."""
        # What running prompts still need is theirs; a block of headroom each, so that whoever is admitted is not
        # preempted a moment later.
        promised = sum(max(0, blocks_for(s.num_tokens + 1) - len(s.blocks)) + 1 for s in self.running)
        needed = blocks_for(sequence.num_tokens + 1) - len(found) + promised
        if self.running and needed > self.pool.num_available - sum(not self.pool.is_held(block) for block in found):
            return False
        for block in found:
            self.pool.hold(block)
        sequence.blocks = found
        sequence.num_computed_tokens = len(found) * BLOCK_TOKENS
        if sequence.num_generated_tokens == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        return True

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a sequence blocks for so many tokens; False when there are too few."""
        while len(sequence.blocks) < blocks_for(num_tokens):
            block = self.pool.allocate()
            if block is None:
                return False
            sequence.blocks.append(block)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed_tokens = sequence.eligible_step = sequence.decoding_step = 0
