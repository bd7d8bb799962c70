"""The text engine: one thread that turns the running batch into tokens, and the asyncio face of it.

Above: the worker's servicers. Below: scheduler (who runs), runner (the model), sampler, sequences. The whole
loop is `_loop`: take in what arrived → schedule → run → postprocess → hand out. The thread owns every
sequence from arrival to finish; the asyncio side only submits, cancels and reads a queue.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as SequenceOf

import torch
from hostler.errors import HostlerError, Internal, OutOfMemory, Unavailable

from workers.engine import EngineStats, Event, Finish, GenerationRequest, LoadSpec, ModelFacts, Prompt, TokenLogprob
from workers.text.embeddings import PromptExtras
from workers.text.intake import Intake
from workers.text.kv_cache import BLOCK_TOKENS, BlockPool, PrefixHashes
from workers.text.loader import LoadedModel
from workers.text.lookup import Lookup
from workers.text.pace import Pace
from workers.text.packing import wanted_rows
from workers.text.runner import Runner
from workers.text.sampler import RowSampling, logprobs, sample
from workers.text.scheduler import Scheduler, SchedulerLimits, Step, Work
from workers.text.sequence import Sequence
from workers.text.vocabulary import TokenBytes

log = logging.getLogger(__name__)

Outcome = Event | HostlerError
Outcomes = list[tuple[Sequence, Event | HostlerError]]

_SWITCH_INTERVAL_S = 0.0002
# With more sequences than this the products are no longer bound by reading the weights, and guesses are not free.
_MOST_GUESSING = 2


class TextEngine:
    """Continuous batching for one loaded model. Create and use in one asyncio loop.

    Args:
        loaded: what the model is; its weights are the runner's business.
        spec: limits.
        runner: runs steps; `adopt` may replace it later.
    """

    def __init__(self, loaded: LoadedModel, spec: LoadSpec, runner: Runner) -> None:
        self._loaded = loaded
        self._asyncio = asyncio.get_running_loop()
        self._intake = Intake(loaded, spec.num_threads or len(os.sched_getaffinity(0)), self._note_change)
        self._token_bytes = TokenBytes(loaded.tokenizer)
        self._runner = runner
        self._replacement: Runner | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._scheduler = Scheduler(
            SchedulerLimits(
                max_running=spec.max_running,
                max_queued=spec.max_queued,
                max_context_tokens=loaded.kv.max_context_tokens,
            ),
            BlockPool(loaded.kv.num_blocks),
            Pace(max_chunk=spec.prefill_chunk_tokens),
        )
        self._arrivals: deque[Sequence] = deque()
        self._queues: dict[Sequence, asyncio.Queue[Outcome]] = {}
        self._wake = threading.Event()
        self._closing = False
        self._isolate = False
        self._serial = 0
        self._num_steps = 0
        self._spent: dict[str, float] = defaultdict(float)  # seconds, by part of a step
        self._num_prompt_tokens = 0
        self._num_completion_tokens = 0
        self._changed: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ asyncio side

    @property
    def facts(self) -> ModelFacts:
        """What the model is."""
        return self._loaded.facts

    def stats(self) -> EngineStats:
        """Counters as of now."""
        pool, block_bytes = self._scheduler.pool, BLOCK_TOKENS * self._loaded.facts.kv_bytes_per_token
        running = len(self._scheduler.running)
        return EngineStats(
            num_steps=self._num_steps,
            num_running=running,
            num_queued=self._intake.num_preparing + max(0, len(self._queues) - running),
            max_running=self._scheduler.limits.max_running,
            kv_used_bytes=pool.num_in_use * block_bytes,
            kv_reserved_bytes=pool.num_blocks * block_bytes,
            num_prompt_tokens_total=self._num_prompt_tokens,
            num_completion_tokens_total=self._num_completion_tokens,
        )

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the loop whenever running or queued counts change."""
        self._changed = callback

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """Return the prompt's token ids."""
        return await self._intake.tokenize(prompt)

    async def detokenize(self, ids: SequenceOf[int]) -> str:
        """Return the text of token ids."""
        return await self._intake.detokenize(ids)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """Serve one request; see `workers.engine.Engine.generate`."""
        ids, extras = await self._intake.prepare(request.prompt, self._check)
        if self._closing:
            raise Unavailable("This model is being unloaded. Try again.")
        self._check(len(ids), 0)
        sequence = self._new_sequence(request, ids, extras)
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

    def step_seconds(self) -> dict[str, float]:
        """Return where the time of all steps since the last call went: the model's parts, then the engine's own."""
        spent, self._spent = self._spent, defaultdict(float)
        inside = self._runner.seconds() or {"model": spent["model"]}
        rest = spent["step"] - spent["schedule"] - spent["model"]
        packing = max(0.0, spent["model"] - sum(inside.values()))
        return {**inside, "packing": packing, "schedule": spent["schedule"], "sample and tell": rest}

    @property
    def runner(self) -> str:
        """The name of the runner that serves now."""
        return self._runner.name

    def keep(self, task: asyncio.Task[None]) -> None:
        """Own a task that works for this engine; `close` cancels it."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def adopt(self, runner: Runner) -> None:
        """Go over to another runner of the same model, between two steps; running requests are prefilled again."""
        self._replacement = runner
        self._wake.set()

    async def close(self) -> None:
        """Fail what still runs, end the thread, free the weights."""
        self._closing = True
        self._wake.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.to_thread(self._thread.join, 10.0)
        self._intake.close()
        if not self._thread.is_alive():
            self._runner.close()

    def _check(self, num_prompt_tokens: int, num_preparing: int) -> None:
        self._scheduler.check(num_prompt_tokens, len(self._queues) + num_preparing)

    def _note_change(self) -> None:
        self._changed()

    def _new_sequence(self, request: GenerationRequest, ids: list[int], extras: PromptExtras) -> Sequence:
        wanted, defaults = request.sampling, self._loaded.defaults
        room = self._scheduler.longest_tokens - len(ids)
        repetition = wanted.repetition_penalty
        rules = RowSampling(
            temperature=_first(wanted.temperature, defaults.get("temperature"), 1.0),
            top_p=_first(wanted.top_p, defaults.get("top_p"), 1.0),
            top_k=int(_first(wanted.top_k, defaults.get("top_k"), 0)),
            min_p=_first(wanted.min_p, defaults.get("min_p"), 0.0),
            frequency_penalty=wanted.frequency_penalty,
            presence_penalty=wanted.presence_penalty,
            repetition_penalty=repetition if repetition != 1.0 else defaults.get("repetition_penalty", 1.0),
            logit_bias=wanted.logit_bias,
            seed=wanted.seed,
        )
        self._serial += 1
        return Sequence(
            request=request,
            sampling=rules,
            token_ids=list(ids),
            num_prompt_tokens=len(ids),
            max_tokens=room if request.max_tokens is None else min(room, request.max_tokens),
            decode=self._decode,
            serial=self._serial,
            hashes=PrefixHashes(
                request.cache_scope.encode(), [(span.start, span.content_hash) for span in extras.embeddings]
            ),
            embeddings=extras.embeddings,
            rope=extras.rope,
            lookup=Lookup(ids),
        )

    def _decode(self, ids: SequenceOf[int]) -> str:
        return str(self._loaded.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    # ------------------------------------------------------------ engine thread

    def _loop(self) -> None:
        # The loop below takes the interpreter lock at every operator; at Python's 5 ms a busy asyncio thread would
        # hold each step up many times over.
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        while not self._closing:
            self._take_in()
            asked_s = time.monotonic()
            step = self._scheduler.schedule()
            if not step:
                self._wake.wait()
                self._wake.clear()
                continue
            began_s = time.monotonic()
            self._spent["schedule"] += began_s - asked_s
            out: Outcomes = []
            for part in self._parts(step):
                self._run_part(part, out, began_s)
                self._num_steps += 1
            self._scheduler.pace.observe(step.num_decodes, step.num_prompt_tokens, time.monotonic() - began_s)
            self._hand_out(out)
            self._spent["step"] += time.monotonic() - asked_s
        gone = Unavailable("This model was unloaded while it answered. Try again.")
        self._hand_out([(s, gone) for s in (*self._scheduler.running, *self._scheduler.waiting, *self._arrivals)])

    def _take_in(self) -> None:
        """Go over to a new runner if there is one, drop the cancelled, queue the new."""
        scheduler = self._scheduler
        if self._replacement is not None:
            scheduler.preempt_all()
            scheduler.pace = Pace(max_chunk=scheduler.pace.max_chunk)
            replaced, self._runner, self._replacement = self._runner, self._replacement, None
            replaced.close()
            log.info("runner replaced", extra={"model": self.facts.model, "runner": self._runner.name})
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
        return [Step((work,), int(index < step.num_decodes)) for index, work in enumerate(step.works)]

    def _run_part(self, step: Step, out: Outcomes, began_s: float) -> None:
        for work in step.works:
            work.sequence.scheduled_s = work.sequence.scheduled_s or began_s
        try:
            entered_s = time.monotonic()
            logits = self._runner.run(step)
            self._spent["model"] += time.monotonic() - entered_s
        except Exception as error:  # any failure of the model must cost one request, never the engine
            log.exception("step failed", extra={"num_sequences": len(step.works)})
            if len(step.works) > 1:
                # Cache writes are idempotent: the same step runs again, one sequence at a time.
                self._isolate = True
            else:
                self._fail(step.works[0].sequence, _named(error), out)
            return
        first_row = 0
        rows: dict[Work, int] = {}
        for work in step.works:
            if work.yields_token:
                rows[work] = first_row
                first_row += wanted_rows(work)
            else:
                self._scheduler.computed(work, 0)
        self._postprocess(rows, logits, out)

    def _postprocess(self, rows: dict[Work, int], logits: torch.Tensor, out: Outcomes) -> None:
        """Sample each work's next tokens: one, and one more for each draft token that proves right.

        Args:
            rows: each work's first row of `logits` (rows, vocab) float32.
        """
        checked = 0  # draft tokens of every work still here that proved right
        guesses = len(self._scheduler.running) <= _MOST_GUESSING
        while rows:
            works = list(rows)
            chosen = torch.tensor([rows[work] + checked for work in works])
            tokens = self._sample(works, logits[chosen] if len(works) < len(logits) else logits)
            now_s = time.monotonic()
            for work, token in zip(works, tokens, strict=True):
                row = rows[work] + checked
                alive = self._accept(work.sequence, token, logits[row], now_s, out)
                if alive and checked < len(work.draft) and work.draft[checked] == token:
                    continue
                del rows[work]
                if token is not None:
                    self._scheduler.computed(work, checked)
                if alive:
                    work.sequence.guess(work.draft, checked, allowed=guesses)
                else:
                    self._scheduler.remove(work.sequence)
            checked += 1

    def _sample(self, works: list[Work], logits: torch.Tensor) -> list[int | None]:
        sequences = [work.sequence for work in works]
        return sample(logits, [s.sampling for s in sequences], [s.history for s in sequences])

    def _accept(
        self,
        sequence: Sequence,
        token: int | None,
        row: torch.Tensor,
        now_s: float,
        out: Outcomes,
    ) -> bool:
        """Give a sequence its next token and tell its request; return whether it goes on."""
        if token is None:
            out.append((sequence, Internal("The model produced no valid probabilities for this request.")))
            return False
        try:
            chosen = self._logprob(row, token, sequence) if sequence.request.top_logprobs is not None else None
            ends = token in self._loaded.eos_ids and not sequence.request.sampling.ignore_eos
            delta = sequence.accept(token, is_eos=ends, logprob=chosen)
        except Exception as error:  # a fault in one reply's bookkeeping stays its own
            log.exception("postprocessing failed", extra={"request_id": sequence.request.request_id})
            out.append((sequence, _named(error)))
            return False
        self._num_completion_tokens += 1
        sequence.first_token_s = sequence.first_token_s or now_s
        if delta is not None:
            out.append((sequence, delta))
        if sequence.finish_reason is not None:
            out.append((sequence, self._finish(sequence, now_s)))
        return sequence.finish_reason is None

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
            num_cached_tokens=sequence.num_cached_tokens,
            stop=sequence.stop,
            queue_us=int((sequence.scheduled_s - sequence.arrived_s) * 1e6),
            prefill_us=int((sequence.first_token_s - sequence.scheduled_s) * 1e6),
            decode_us=int((now - sequence.first_token_s) * 1e6),
        )

    def _fail(self, sequence: Sequence, error: HostlerError, out: Outcomes) -> None:
        self._scheduler.remove(sequence)
        out.append((sequence, error))

    def _hand_out(self, out: Outcomes) -> None:
        """Pass a step's outcomes to the loop in one call."""
        if out and not self._asyncio.is_closed():
            self._asyncio.call_soon_threadsafe(self._deliver, out)

    def _deliver(self, out: Outcomes) -> None:
        for sequence, outcome in out:
            if (queue := self._queues.get(sequence)) is not None:
                queue.put_nowait(outcome)
        self._changed()


def _first(wanted: float | None, default: float | None, neutral: float) -> float:
    if wanted is not None:
        return wanted
    return neutral if default is None else default


def _named(error: Exception) -> HostlerError:
    if isinstance(error, HostlerError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return OutOfMemory("Memory ran out while this request was served. Try again, or with a shorter prompt.")
    return Internal("The model failed on this request; the server's log has the details.")
