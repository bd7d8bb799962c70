"""From a step's logits to what its requests hear: masks, sampling, drafts proved or dropped, ends.

Above: the engine's loop. Below: sampler, grammar, sequences; the scheduler is told what was computed and who is done.
Runs on the engine's thread. Where a device works by itself meanwhile, the text of tokens that decide nothing is made
while the next step runs: `take` keeps them, `tell` turns them into events.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter

import torch
from hostler.errors import HostlerError, Internal, OutOfMemory

from workers.ending import end_if_device_is_lost
from workers.engine import Event, Finish, Progress, PromptLogprobs, TokenLogprob
from workers.text.packing import wanted_rows
from workers.text.sampler import History, logprobs, prompt_logprobs, sample, sample_each
from workers.text.scheduler import Scheduler, Step, Work
from workers.text.sequence import Sequence
from workers.text.vocabulary import TokenBytes

log = logging.getLogger(__name__)

Outcome = Event | HostlerError
Outcomes = list[tuple[Sequence, Event | HostlerError]]
Masks = dict[Work, torch.Tensor | HostlerError | None]

_NO_HISTORY = History((), Counter())
# With more sequences than this the products are no longer bound by reading the weights, and guesses are not free.
_MOST_GUESSING = 2


class Postprocessor:
    """Takes the logits of one model's steps.

    Args:
        scheduler: the engine's.
        eos_ids: tokens that end a reply.
        token_bytes: for logprobs.
    """

    def __init__(self, scheduler: Scheduler, eos_ids: frozenset[int], token_bytes: TokenBytes) -> None:
        self._scheduler = scheduler
        self._eos_ids = eos_ids
        self._token_bytes = token_bytes
        self._late: list[tuple[Sequence, int]] = []
        self.num_completion_tokens = 0

    @staticmethod
    def begin(step: Step, now_s: float) -> Outcomes:
        """Note whose turn has come for the first time; return what those who asked hear of it before the step runs."""
        begun = [work.sequence for work in step.works if not work.sequence.scheduled_s]
        for sequence in begun:
            sequence.scheduled_s = now_s
        return [
            (sequence, Progress(sequence.num_prompt_tokens, sequence.num_cached_tokens))
            for sequence in begun
            if sequence.request.wants_progress
        ]

    def tell(self) -> Outcomes:
        """Return what came of the tokens that `take` kept; to be called before it is given the next step."""
        out: Outcomes = []
        for sequence, token in self._late:
            try:
                out.extend((sequence, event) for event in sequence.reply.accept(token, is_eos=False, logprob=None))
            except Exception as error:  # as in `_accept`; the next step may be under way with it already
                log.exception("postprocessing failed", extra={"request_id": sequence.request.request_id})
                out.append((sequence, named(error)))
                sequence.cancelled = True
        self._late.clear()
        return out

    def take(self, step: Step, logits: torch.Tensor, masks: Masks, out: Outcomes, *, late: bool = False) -> None:
        """Note what a step computed, sample each work's next tokens and tell its request.

        Each work gives one token, and one more for each draft token that proves right.

        Args:
            logits: (rows, vocab) float32, each work's rows together and in order.
            masks: what each work's first row may bring; guided work has no draft, so no other row needs one.
            out: grows by the events and errors of the step.
            late: whether `tell` is called once the next step runs.
        """
        rows: dict[Work, int] = {}
        num_rows = 0
        for work in step.works:
            scored, wanted = len(work.scored_rows), wanted_rows(work)
            alive = not scored or self._score(work, logits[num_rows : num_rows + scored], out)
            if not alive:
                self._scheduler.remove(work.sequence)
            elif not work.yields_token:
                self._scheduler.computed(work, 0)
            elif self._ends_before_reply(work.sequence, out):
                self._scheduler.remove(work.sequence)
            else:
                rows[work] = num_rows + scored
            num_rows += wanted
        checked = 0  # draft tokens of every work still here that proved right
        guesses = len(self._scheduler.running) <= _MOST_GUESSING
        while rows:
            works = list(rows)
            chosen = logits if len(works) == len(logits) else logits[torch.tensor([rows[w] + checked for w in works])]
            tokens = self._sample(works, chosen, masks)
            now_s = time.monotonic()
            for work, token in zip(works, tokens, strict=True):
                if late and not work.draft and isinstance(token, int) and self._keeps(work.sequence, token, now_s):
                    alive = True
                else:
                    alive = self._accept(work.sequence, token, logits[rows[work] + checked], now_s, out)
                if alive and checked < len(work.draft) and work.draft[checked] == token:
                    continue
                del rows[work]
                if isinstance(token, int):
                    self._scheduler.computed(work, checked)
                if alive:
                    work.sequence.guess(work.draft, checked, allowed=guesses)
                else:
                    self._scheduler.remove(work.sequence)
            checked += 1

    def _score(self, work: Work, rows: torch.Tensor, out: Outcomes) -> bool:
        """Note the logprobs that rows (n, vocab) give to the prompt tokens after them; False if that fails."""
        sequence, scored = work.sequence, work.scored_rows
        of, top = self._token_bytes, sequence.request.top_logprobs or 0
        ids = sequence.token_ids[scored.start + 1 : scored.stop + 1]
        if rows.isnan().any() or not rows.isfinite().any(dim=-1).all():
            out.append((sequence, Internal("The model produced no valid probabilities for this request.")))
            return False
        for token, (value, likeliest) in zip(ids, prompt_logprobs(rows, ids, top), strict=True):
            alternatives = tuple(TokenLogprob(i, of(i), v) for i, v in likeliest)
            sequence.prompt_logprobs.append(TokenLogprob(token, of(token), value, alternatives))
        sequence.num_scored_rows = scored.stop
        return True

    def _ends_before_reply(self, sequence: Sequence, out: Outcomes) -> bool:
        """Tell the prompt's logprobs before the first token; return whether no token is wanted after them."""
        if sequence.num_generated_tokens:
            return False
        if sequence.request.echo_logprobs:
            first = sequence.token_ids[0]
            head = TokenLogprob(first, self._token_bytes(first), math.nan)
            out.append((sequence, PromptLogprobs((head, *sequence.prompt_logprobs))))
        if sequence.max_tokens > 0:
            return False
        sequence.first_token_s = now_s = time.monotonic()
        sequence.reply.finish_reason = "length"
        out.append((sequence, self._finish(sequence, now_s)))
        return True

    def _sample(self, works: list[Work], logits: torch.Tensor, masks: Masks) -> list[int | HostlerError | None]:
        sequences = [work.sequence for work in works]
        found = [masks[work] for work in works]
        rules = [s.sampling for s in sequences]
        # A history is a copy of the prompt: only for those who look at it.
        histories = [s.history if s.sampling.edits_logits else _NO_HISTORY for s in sequences]
        allowed = [None if isinstance(mask, HostlerError) else mask for mask in found]
        try:
            tokens = sample(logits, rules, histories, allowed)
        except Exception:  # whatever one row brings up must cost one request, never the engine
            log.exception("sampling failed for a batch; now row by row")
            end_if_device_is_lost()
            tokens = sample_each(logits, rules, histories, allowed)
        return [
            mask if isinstance(mask, HostlerError) else token if token is None else s.reply.forced_token or token
            for s, mask, token in zip(sequences, found, tokens, strict=True)
        ]

    def _accept(
        self, sequence: Sequence, token: int | HostlerError | None, row: torch.Tensor, now_s: float, out: Outcomes
    ) -> bool:
        """Give a sequence its next token and tell its request; return whether it goes on."""
        if token is None:
            token = Internal("The model produced no valid probabilities for this request.")
        if isinstance(token, HostlerError):
            out.append((sequence, token))
            return False
        try:
            chosen = self._logprob(row, token, sequence) if sequence.request.top_logprobs is not None else None
            events = sequence.accept(token, is_eos=self._ends(sequence, token), logprob=chosen)
        except Exception as error:  # a fault in one reply's bookkeeping stays its own
            log.exception("postprocessing failed", extra={"request_id": sequence.request.request_id})
            out.append((sequence, named(error)))
            return False
        self.num_completion_tokens += 1
        sequence.first_token_s = sequence.first_token_s or now_s
        out.extend((sequence, event) for event in events)
        if sequence.finish_reason is not None:
            out.append((sequence, self._finish(sequence, now_s)))
        return sequence.finish_reason is None

    def _keeps(self, sequence: Sequence, token: int, now_s: float) -> bool:
        """Give a sequence its next token and keep its text for `tell`, if nothing depends on it; return whether so."""
        if not sequence.may_be_told_later or sequence.request.top_logprobs is not None or self._ends(sequence, token):
            return False
        sequence.note(token)
        self._late.append((sequence, token))
        self.num_completion_tokens += 1
        sequence.first_token_s = sequence.first_token_s or now_s
        return True

    def _ends(self, sequence: Sequence, token: int) -> bool:
        return (token in self._eos_ids or token in sequence.end_ids) and not sequence.request.sampling.ignore_eos

    def _logprob(self, row: torch.Tensor, token: int, sequence: Sequence) -> TokenLogprob:
        value, top = logprobs(row, token, sequence.request.top_logprobs or 0)
        of = self._token_bytes
        return TokenLogprob(token, of(token), value, tuple(TokenLogprob(i, of(i), v) for i, v in top))

    @staticmethod
    def _finish(sequence: Sequence, now_s: float) -> Finish:
        return Finish(
            reason=sequence.finish_reason or "stop",
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_completion_tokens=sequence.num_generated_tokens,
            num_cached_tokens=sequence.num_cached_tokens,
            num_reasoning_tokens=sequence.reply.num_reasoning_tokens,
            stop=sequence.reply.stop,
            queue_us=int((sequence.scheduled_s - sequence.arrived_s) * 1e6),
            prefill_us=int((sequence.first_token_s - sequence.scheduled_s) * 1e6),
            decode_us=int((now_s - sequence.first_token_s) * 1e6),
        )


def named(error: Exception) -> HostlerError:
    """Return an exception as an error of ours, without its text."""
    if isinstance(error, HostlerError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return OutOfMemory("Memory ran out while this request was served. Try again, or with a shorter prompt.")
    return Internal("The model failed on this request; the server's log has the details.")
