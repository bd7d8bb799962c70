"""The text engine: one thread that turns the running batch into tokens, and the asyncio face of it.

Above: the worker's servicers. Below: scheduler (who runs), runner (the model), sampler, sequences. The whole
loop is `_loop`: take in what arrived → schedule → run → postprocess → hand out. The thread owns every
sequence from arrival to finish; the asyncio side only submits, cancels and reads a queue.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from hostler.errors import HostlerError, Internal, OutOfMemory, Unavailable

from workers.engine import EngineStats, Event, Finish, GenerationRequest, LoadSpec, ModelFacts, Prompt, TokenLogprob
from workers.text.grammar import MaskPool, PendingMasks, collect
from workers.text.kv_cache import SlotCache
from workers.text.loader import LoadedModel
from workers.text.prompts import PromptEncoder
from workers.text.reply_plan import ReplyPlan, ReplyPlanner
from workers.text.runner import ModelRunner
from workers.text.sampler import logprobs, row_rules, sample, sample_each
from workers.text.scheduler import Scheduler, SchedulerLimits, Step
from workers.text.sequence import Sequence
from workers.text.threads import Threads
from workers.text.vocabulary import TokenBytes

log = logging.getLogger(__name__)

Outcome = Event | HostlerError

_SWITCH_INTERVAL_S = 0.0002


class TextEngine:
    """Continuous batching for one loaded model. Create and use in one asyncio loop."""

    def __init__(self, loaded: LoadedModel, spec: LoadSpec, threads: Threads) -> None:
        self._loaded = loaded
        self._threads = threads
        self._asyncio = asyncio.get_running_loop()
        self._replies = ReplyPlanner(loaded.tokenizer, loaded.facts.vocab_size, loaded.eos_ids)
        self._masks = MaskPool()
        self._facts = replace(
            loaded.facts,
            supports_tools=self._replies.supports_tools,
            supports_reasoning=self._replies.supports_reasoning,
        )
        self._encoder = PromptEncoder(
            loaded.tokenizer,
            loaded.facts.vocab_size,
            loaded.kv.capacity,
            arguments_as_text=self._replies.arguments_as_text,
        )
        self._token_bytes = TokenBytes(loaded.tokenizer)
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._runner = ModelRunner(loaded.model, SlotCache(loaded.kv, loaded.dtype, loaded.device))
        self._scheduler = Scheduler(
            SchedulerLimits(
                max_running=loaded.kv.num_slots,
                max_queued=spec.max_queued,
                budget_tokens=loaded.kv.budget_tokens,
                max_context_tokens=loaded.kv.capacity,
                prefill_chunk_tokens=spec.prefill_chunk_tokens,
            )
        )
        self._arrivals: deque[Sequence] = deque()
        self._queues: dict[Sequence, asyncio.Queue[Outcome]] = {}
        self._wake = threading.Event()
        self._closing = False
        self._isolate = False
        self._serial = 0
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_completion_tokens = 0
        self._changed: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ asyncio side

    @property
    def facts(self) -> ModelFacts:
        """What the model is."""
        return self._facts

    def stats(self) -> EngineStats:
        """Counters as of now."""
        cache = self._runner.cache
        running = len(self._scheduler.running)
        return EngineStats(
            num_steps=self._num_steps,
            num_running=running,
            num_queued=max(0, len(self._queues) - running),
            max_running=self._scheduler.limits.max_running,
            kv_used_bytes=self._scheduler.held_tokens * cache.bytes_per_token,
            kv_reserved_bytes=self._scheduler.limits.budget_tokens * cache.bytes_per_token,
            num_prompt_tokens_total=self._num_prompt_tokens,
            num_completion_tokens_total=self._num_completion_tokens,
        )

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the loop whenever running or queued counts change."""
        self._changed = callback

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """Return the prompt's token ids."""
        return await self._asyncio.run_in_executor(self._encoding, self._encoder.encode, prompt)

    async def detokenize(self, ids: SequenceOf[int]) -> str:
        """Return the text of token ids."""
        return str(await self._asyncio.run_in_executor(self._encoding, self._loaded.tokenizer.decode, list(ids)))

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """Serve one request; see `workers.engine.Engine.generate`."""
        ids = await self.tokenize(request.prompt)
        if self._closing:
            raise Unavailable("This model is being unloaded. Try again.")
        self._scheduler.check(len(ids), len(self._queues))
        plan = await self._replies.plan(request, ids)
        if plan.takes_time:
            self._scheduler.check(len(ids), len(self._queues))
        sequence = self._new_sequence(request, ids, plan)
        outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        self._queues[sequence] = outcomes
        self._arrivals.append(sequence)
        self._wake.set()
        self._changed()
        try:
            while True:
                outcome = await outcomes.get()
                if isinstance(outcome, HostlerError):
                    raise outcome
                yield outcome
                if isinstance(outcome, Finish):
                    return
        finally:
            sequence.cancelled = True
            self._queues.pop(sequence, None)
            self._wake.set()
            self._changed()

    async def close(self) -> None:
        """Fail what still runs, end the thread, free the weights."""
        self._closing = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join, 10.0)
        self._encoding.shutdown(wait=False)
        self._masks.close()
        self._replies.close()

    def _new_sequence(self, request: GenerationRequest, ids: list[int], plan: ReplyPlan) -> Sequence:
        limits = self._scheduler.limits
        room = min(limits.max_context_tokens, limits.budget_tokens) - len(ids)
        self._serial += 1
        max_tokens = room if request.max_tokens is None else min(room, request.max_tokens)
        return Sequence(
            request=request,
            sampling=row_rules(request.sampling, self._loaded.defaults),
            token_ids=list(ids),
            num_prompt_tokens=len(ids),
            max_tokens=max_tokens,
            decode=plan.decode,
            serial=self._serial,
            reply=plan.reply(max_tokens),
        )

    # ------------------------------------------------------------ engine thread

    def _loop(self) -> None:
        # The loop below takes the interpreter lock at every operator; at Python's 5 ms a busy asyncio thread would
        # hold each step up many times over.
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        while not self._closing:
            self._take_in()
            step = self._scheduler.schedule()
            if not step:
                self._wake.wait()
                self._wake.clear()
                continue
            now = time.monotonic()
            for work in step.prefills:
                work.sequence.scheduled_s = work.sequence.scheduled_s or now
            out: list[tuple[Sequence, Outcome]] = []
            for part in self._parts(step):
                self._run_part(part, out)
                self._num_steps += 1
            self._hand_out(out)
        gone = Unavailable("This model was unloaded while it answered. Try again.")
        self._hand_out([(s, gone) for s in (*self._scheduler.running, *self._scheduler.waiting, *self._arrivals)])

    def _take_in(self) -> None:
        """Drop the cancelled, queue the new."""
        scheduler = self._scheduler
        for sequence in [s for s in (*scheduler.running, *scheduler.waiting) if s.cancelled]:
            scheduler.remove(sequence)
        while self._arrivals:
            sequence = self._arrivals.popleft()
            if not sequence.cancelled:
                self._num_prompt_tokens += sequence.num_prompt_tokens
                scheduler.add(sequence)

    def _parts(self, step: Step) -> list[Step]:
        """The step whole; after a failed one, cut into one sequence each, so that only the culprit fails."""
        if not self._isolate:
            return [step]
        self._isolate = False
        singles = [Step((w,), (), ()) for w in step.decodes] + [Step((), (w,), ()) for w in step.prefills]
        return [Step((), (), step.moves), *singles] if step.moves else singles

    def _run_part(self, step: Step, out: list[tuple[Sequence, Outcome]]) -> None:
        works = (*step.decodes, *step.prefills)
        if not works:
            self._runner.move(step)
            return
        torch.set_num_threads(self._threads.for_rows(sum(w.end - w.start for w in works)))
        decodes = sorted(step.decodes, key=lambda w: w.sequence.slot)
        rows = [w.sequence for w in (*decodes, *step.prefills) if w.yields_token]
        pending = self._masks.submit([s.reply.guide for s in rows])
        try:
            logits = self._runner.run(step)
        except Exception as error:  # any failure of the model must cost one request, never the engine
            log.exception("step failed", extra={"num_sequences": len(works)})
            collect(pending)
            if len(works) > 1:
                # Cache writes are idempotent: the same step runs again, one sequence at a time.
                self._isolate = True
            else:
                self._fail(works[0].sequence, _named(error), out)
            return
        for work in works:
            work.sequence.num_computed_tokens = work.end
        if rows:
            self._postprocess(rows, logits, pending, out)

    def _postprocess(
        self,
        rows: list[Sequence],
        logits: torch.Tensor,
        pending: PendingMasks,
        out: list[tuple[Sequence, Outcome]],
    ) -> None:
        """Sample one token for each row and tell its request; `logits` is (rows, vocab) float32."""
        masks = collect(pending)
        allowed = [None if isinstance(mask, HostlerError) else mask for mask in masks]
        raw = {i: logits[i].clone() for i, s in enumerate(rows) if s.request.top_logprobs is not None}
        rules, histories = [s.sampling for s in rows], [s.history for s in rows]
        try:
            tokens = sample(logits, rules, histories, allowed)
        except Exception:  # whatever one row brings up must cost one request, never the engine
            log.exception("sampling failed for a batch; now row by row")
            tokens = sample_each(logits, rules, histories, allowed)
        now = time.monotonic()
        for index, (sequence, token) in enumerate(zip(rows, tokens, strict=True)):
            mask = masks[index]
            if isinstance(mask, HostlerError):
                self._fail(sequence, mask, out)
                continue
            if token is None:
                self._fail(sequence, Internal("The model produced no valid probabilities for this request."), out)
                continue
            if (forced := sequence.reply.forced_token) is not None:
                token = forced
            try:
                chosen = self._logprob(raw[index], token, sequence) if index in raw else None
                ends = token in self._loaded.eos_ids and not sequence.request.sampling.ignore_eos
                events = sequence.accept(token, is_eos=ends, logprob=chosen)
            except Exception as error:  # a fault in one reply's bookkeeping stays its own
                log.exception("postprocessing failed", extra={"request_id": sequence.request.request_id})
                self._fail(sequence, _named(error), out)
                continue
            self._num_completion_tokens += 1
            sequence.first_token_s = sequence.first_token_s or now
            out.extend((sequence, event) for event in events)
            if sequence.finish_reason is not None:
                self._scheduler.remove(sequence)
                out.append((sequence, self._finish(sequence, now)))

    def _logprob(self, row: torch.Tensor, token: int, sequence: Sequence) -> TokenLogprob:
        value, top = logprobs(row, token, sequence.request.top_logprobs or 0)
        of = self._token_bytes
        return TokenLogprob(token, of(token), value, tuple(TokenLogprob(i, of(i), v) for i, v in top))

    @staticmethod
    def _finish(sequence: Sequence, now: float) -> Finish:
        return Finish(
            reason=sequence.finish_reason or "stop",
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_completion_tokens=sequence.num_generated_tokens,
            num_reasoning_tokens=sequence.reply.num_reasoning_tokens,
            stop=sequence.reply.stop,
            queue_us=int((sequence.scheduled_s - sequence.arrived_s) * 1e6),
            prefill_us=int((sequence.first_token_s - sequence.scheduled_s) * 1e6),
            decode_us=int((now - sequence.first_token_s) * 1e6),
        )

    def _fail(self, sequence: Sequence, error: HostlerError, out: list[tuple[Sequence, Outcome]]) -> None:
        self._scheduler.remove(sequence)
        out.append((sequence, error))

    def _hand_out(self, out: list[tuple[Sequence, Outcome]]) -> None:
        """Pass a step's outcomes to the loop in one call."""
        if out and not self._asyncio.is_closed():
            self._asyncio.call_soon_threadsafe(self._deliver, out)

    def _deliver(self, out: list[tuple[Sequence, Outcome]]) -> None:
        for sequence, outcome in out:
            if (queue := self._queues.get(sequence)) is not None:
                queue.put_nowait(outcome)
        self._changed()


def _named(error: Exception) -> HostlerError:
    if isinstance(error, HostlerError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return OutOfMemory("Memory ran out while this request was served. Try again, or with a shorter prompt.")
    return Internal("The model failed on this request; the server's log has the details.")
