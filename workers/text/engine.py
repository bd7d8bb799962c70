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
from dataclasses import replace

from hostler.errors import HostlerError, Unavailable

from workers.engine import EngineStats, Event, Finish, GenerationRequest, LoadSpec, ModelFacts, Prompt, TextPrompt
from workers.text.directory import LoadedModel
from workers.text.embeddings import PromptExtras
from workers.text.grammar import MaskPool, collect
from workers.text.intake import Intake
from workers.text.kv_cache import BLOCK_TOKENS, BlockPool, PrefixHashes
from workers.text.lookup import Lookup
from workers.text.pace import Pace
from workers.text.postprocess import Outcome, Outcomes, Postprocessor, named
from workers.text.reply_plan import ReplyPlan, ReplyPlanner
from workers.text.runner import Runner
from workers.text.sampler import row_rules
from workers.text.scheduler import Scheduler, SchedulerLimits, Step
from workers.text.sequence import Sequence
from workers.text.vocabulary import TokenBytes

log = logging.getLogger(__name__)

_SWITCH_INTERVAL_S = 0.0002


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
        self._replies = ReplyPlanner(loaded.tokenizer, loaded.facts.vocab_size, loaded.eos_ids)
        self._masks = MaskPool()
        self._facts = replace(
            loaded.facts,
            supports_tools=self._replies.supports_tools,
            supports_reasoning=self._replies.supports_reasoning,
        )
        num_threads = spec.num_threads or len(os.sched_getaffinity(0))
        self._intake = Intake(loaded, num_threads, self._note_change, arguments_as_text=self._replies.arguments_as_text)
        fill = self._intake.fill_format
        self._fill_ends = fill.end_ids(loaded.tokenizer) if fill else frozenset[int]()
        self._facts = replace(self._facts, supports_fill_in_middle=fill is not None)
        self._runner = runner
        self._replacement: tuple[Runner, Callable[[], object]] | None = None
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
        self._postprocessor = Postprocessor(self._scheduler, loaded.eos_ids, TokenBytes(loaded.tokenizer))
        self._arrivals: deque[Sequence] = deque()
        self._queues: dict[Sequence, asyncio.Queue[Outcome]] = {}
        self._wake = threading.Event()
        self._closing = False
        self._isolate = False
        self._serial = 0
        self._num_steps = 0
        self._spent: dict[str, float] = defaultdict(float)  # seconds, by part of a step
        self._num_prompt_tokens = 0
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
            num_completion_tokens_total=self._postprocessor.num_completion_tokens,
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
        plan = await self._replies.plan(request, ids)
        if plan.takes_time:
            self._check(len(ids), 0)
        sequence = self._new_sequence(request, ids, extras, plan)
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

    async def adopt(self, runner: Runner) -> None:
        """Go over to another runner of the same model, between two steps; return when the old one runs no more.

        Running requests are prefilled again.
        """
        adopted = asyncio.Event()
        self._replacement = (runner, lambda: self._asyncio.call_soon_threadsafe(adopted.set))
        self._wake.set()
        await adopted.wait()

    async def close(self) -> None:
        """Fail what still runs, end the thread, free the weights."""
        self._closing = True
        self._wake.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.to_thread(self._thread.join, 10.0)
        self._intake.close()
        self._masks.close()
        self._replies.close()
        if not self._thread.is_alive():
            self._runner.close()

    def _check(self, num_prompt_tokens: int, num_preparing: int) -> None:
        self._scheduler.check(num_prompt_tokens, len(self._queues) + num_preparing)

    def _note_change(self) -> None:
        self._changed()

    def _new_sequence(
        self, request: GenerationRequest, ids: list[int], extras: PromptExtras, plan: ReplyPlan
    ) -> Sequence:
        room = self._scheduler.longest_tokens - len(ids)
        max_tokens = room if request.max_tokens is None else min(room, request.max_tokens)
        # Guesses are checked without masks and without forced tokens.
        may_guess = plan.guide is None and plan.budget_tokens is None
        self._serial += 1
        return Sequence(
            request=request,
            sampling=row_rules(request.sampling, self._loaded.defaults),
            token_ids=ids,
            num_prompt_tokens=len(ids),
            max_tokens=max_tokens,
            decode=plan.decode,
            serial=self._serial,
            hashes=PrefixHashes(
                # An adapter changes keys and values; its name has no NUL, so no scope can feign another adapter.
                f"{request.adapter}\0{request.cache_scope}".encode(),
                [(span.start, span.content_hash) for span in extras.embeddings],
            ),
            embeddings=extras.embeddings,
            rope=extras.rope,
            adapter=self._facts.adapters.index(request.adapter) if request.adapter else -1,
            end_ids=self._fill_ends
            if isinstance(request.prompt, TextPrompt) and request.prompt.suffix
            else frozenset(),
            lookup=Lookup(ids) if may_guess else None,
            reply=plan.reply(max_tokens),
        )

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
            replaced, (self._runner, adopted), self._replacement = self._runner, self._replacement, None
            replaced.close()
            adopted()
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
        yielding = [work for work in step.works if work.yields_token]
        pending = self._masks.submit([work.sequence.reply.guide for work in yielding])
        try:
            entered_s = time.monotonic()
            logits = self._runner.run(step)
            self._spent["model"] += time.monotonic() - entered_s
        except Exception as error:  # any failure of the model must cost one request, never the engine
            log.exception("step failed", extra={"num_sequences": len(step.works)})
            collect(pending)
            if len(step.works) > 1:
                # Cache writes are idempotent: the same step runs again, one sequence at a time.
                self._isolate = True
            else:
                self._fail(step.works[0].sequence, named(error), out)
            return
        masks = dict(zip(yielding, collect(pending), strict=True))
        self._postprocessor.take(step, logits, masks, out)

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
