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
from functools import partial

from hostler.errors import HostlerError, Unavailable

from workers.ending import end_if_device_is_lost, or_end
from workers.engine import (
    EngineStats,
    Event,
    Finish,
    GenerationRequest,
    LoadSpec,
    ModelFacts,
    Prompt,
    SamplingParams,
    TokenPrompt,
)
from workers.gentle import gently, load_niceness
from workers.text.directory import LoadedModel
from workers.text.grammar import MaskPool, collect
from workers.text.intake import Intake
from workers.text.kv_cache import BLOCK_TOKENS, MIN_BLOCKS, BlockPool
from workers.text.orders import Orders
from workers.text.pace import Pace
from workers.text.postprocess import Outcome, Outcomes, Postprocessor, named
from workers.text.reply_plan import ReplyPlanner
from workers.text.runner import Runner
from workers.text.scheduler import Scheduler, SchedulerLimits, Step
from workers.text.sequence import Sequence, new_sequence
from workers.text.sleeping import Bed, Opened
from workers.text.vocabulary import TokenBytes

log = logging.getLogger(__name__)

_SWITCH_INTERVAL_S = 0.0002
# The first step of each shape allocates and, eagerly, builds kernels; better now than in somebody's first request.
_WARM_UP = GenerationRequest(
    TokenPrompt((0,) * 8), sampling=SamplingParams(temperature=0.0, ignore_eos=True), max_tokens=2
)


class TextEngine:
    """Continuous batching for one loaded model. Create and use in one asyncio loop.

    Args:
        loaded: what the model is; its weights are the runner's business.
        spec: limits.
        runner: runs steps; `adopt` may replace it later.
        bed: where the model lies while the engine sleeps; without one it cannot.
    """

    def __init__(self, loaded: LoadedModel, spec: LoadSpec, runner: Runner, bed: Bed | None = None) -> None:
        self._loaded = loaded
        self._bed = bed
        self._asleep = False
        self._asyncio = asyncio.get_running_loop()
        self._replies = ReplyPlanner(loaded.tokenizer, loaded.facts.vocab_size, loaded.eos_ids)
        self._masks = MaskPool()
        num_threads = spec.num_threads or len(os.sched_getaffinity(0))
        self._intake = Intake(
            loaded, num_threads, lambda: self._changed(), arguments_as_text=self._replies.arguments_as_text
        )
        self._fill_ends = self._intake.fill_ends
        self._facts = self._complete(loaded.facts)
        self._runner = runner
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
        self._orders = Orders(self._wake.set)
        self._closing = False
        self._isolate = False
        self._serial = 0
        self._num_steps = 0
        self._spent: dict[str, float] = defaultdict(float)  # seconds, by part of a step
        self._num_prompt_tokens = 0
        self._changed: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=partial(or_end, self._loop, "engine"), name="engine", daemon=True)
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
            # Torch's allocator on a GPU backs the whole cache, whatever is written.
            kv_allocated_bytes=block_bytes
            * (pool.num_backed if self._loaded.device.type == "cpu" else pool.num_blocks),
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
        if self._asleep:
            raise Unavailable("This model is asleep. Try again.")
        ids, extras = await self._intake.prepare(request.prompt, self._check)
        if self._closing:
            raise Unavailable("This model is being unloaded. Try again.")
        self._check(len(ids), 0)
        plan = await self._replies.plan(request, ids)
        if plan.takes_time:
            self._check(len(ids), 0)
        self._serial += 1
        sequence = new_sequence(
            request,
            ids,
            extras,
            plan,
            serial=self._serial,
            room=self._scheduler.longest_tokens - len(ids),
            defaults=self._loaded.defaults,
            adapters=self._facts.adapters,
            fill_ends=self._fill_ends,
        )
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
        """Return where steps' time went since the last call; a device that runs ahead is waited for in the last."""
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

    async def settle(self, opened: Opened) -> None:
        """Warm up, and begin what brings a better runner, once a model has come."""
        if opened.runner.name != "native":  # whose first step costs what every step does
            async for _ in self.generate(_WARM_UP):
                pass
        if opened.improve is not None:
            self.keep(asyncio.create_task(opened.improve(self)))

    async def adopt(self, runner: Runner) -> None:
        """Go over to another runner of the same model, between two steps; return when the old one runs no more.

        Running requests are prefilled again.
        """
        await self._orders.between_steps(partial(self._replace, runner))

    async def sleep(self) -> str:
        """See `workers.engine.Sleeper.sleep`. Requests that came too late are told to go elsewhere."""
        assert self._bed is not None, "opened without a bed"
        self._asleep = True
        for task in tuple(self._tasks):
            task.cancel()
        runner = await self._orders.between_steps(self._leave)
        self._intake.see_with(None)
        loaded, self._loaded = self._loaded, self._loaded.without_weights()
        return await gently(partial(self._bed.lay_down, loaded, runner))

    async def wake(self, spec: LoadSpec) -> None:
        """See `workers.engine.Sleeper.wake`."""
        assert self._bed is not None, "opened without a bed"
        opened = await gently(partial(self._bed.get_up, spec), load_niceness(len(spec.devices)))
        is_large = self._facts.loads_lighter  # what a first load imported stays in this process
        self._loaded, self._facts = opened.loaded, replace(self._complete(opened.loaded.facts), loads_lighter=is_large)
        self._intake.see_with(opened.loaded.vision)
        await self._orders.between_steps(partial(self._return, opened))
        self._asleep = False
        await self.settle(opened)

    async def resize(self, kv_cache_bytes: int) -> int:
        """See `workers.engine.Resizable.resize`."""
        block_bytes = BLOCK_TOKENS * self._loaded.facts.kv_bytes_per_token
        wanted = min(max(MIN_BLOCKS, kv_cache_bytes // block_bytes), self._loaded.kv.capacity_blocks)
        return block_bytes * await self._orders.between_steps(partial(self._resize, wanted))

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
        if not self._thread.is_alive() and not self._asleep:
            self._runner.close()

    def _check(self, num_prompt_tokens: int, num_preparing: int) -> None:
        self._scheduler.check(num_prompt_tokens, len(self._queues) + num_preparing)

    def _complete(self, facts: ModelFacts) -> ModelFacts:
        return replace(
            facts,
            supports_tools=self._replies.supports_tools,
            supports_reasoning=self._replies.supports_reasoning,
            supports_fill_in_middle=self._intake.fill_format is not None,
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
                self._hand_out(self._postprocessor.tell())
                self._wake.wait()
                self._wake.clear()
                continue
            began_s = time.monotonic()
            self._spent["schedule"] += began_s - asked_s
            self._hand_out(self._postprocessor.begin(step, began_s))
            out: Outcomes = []
            for part in self._parts(step):
                self._run_part(part, out)
                self._num_steps += 1
            self._scheduler.pace.observe(step.num_decodes, step.num_prompt_tokens, time.monotonic() - began_s)
            self._hand_out(out)
            self._spent["step"] += time.monotonic() - asked_s
        gone = Unavailable("This model was unloaded while it answered. Try again.")
        self._hand_out([(s, gone) for s in (*self._scheduler.running, *self._scheduler.waiting, *self._arrivals)])

    def _take_in(self) -> None:
        """Drop the cancelled, queue the new, then do what was ordered."""
        scheduler = self._scheduler
        for sequence in [s for s in (*scheduler.running, *scheduler.waiting) if s.cancelled]:
            scheduler.remove(sequence)
        while self._arrivals:
            sequence = self._arrivals.popleft()
            if sequence.cancelled:
                continue
            if not scheduler.fits(sequence):  # The cache became smaller since it was checked.
                self._hand_out([(sequence, Unavailable("The room for this request was taken just now. Try again."))])
                continue
            self._num_prompt_tokens += sequence.num_prompt_tokens
            scheduler.add(sequence)
        self._orders.obey()

    def _replace(self, runner: Runner) -> None:
        self._begin_anew(runner)
        log.info("runner replaced", extra={"model": self.facts.model, "runner": runner.name})

    def _begin_anew(self, runner: Runner) -> None:
        self._scheduler.preempt_all()
        self._scheduler.pace = Pace(max_chunk=self._scheduler.pace.max_chunk)
        replaced, self._runner = self._runner, runner
        replaced.close()

    def _leave(self) -> Runner:
        """Refuse whoever is still here, and stop using the runner."""
        scheduler = self._scheduler
        late = (*scheduler.running, *scheduler.waiting)
        for sequence in late:
            scheduler.remove(sequence)
        self._hand_out([(sequence, Unavailable("This model fell asleep. Try again.")) for sequence in late])
        scheduler.pool = BlockPool(0)
        return self._runner

    def _return(self, opened: Opened) -> None:
        scheduler, kv = self._scheduler, opened.loaded.kv
        self._runner = opened.runner
        scheduler.limits = replace(scheduler.limits, max_context_tokens=kv.max_context_tokens)
        scheduler.pool = BlockPool(kv.num_blocks)
        scheduler.pace = Pace(max_chunk=scheduler.pace.max_chunk)

    def _resize(self, num_blocks: int) -> int:
        """Return how many blocks there are now."""
        scheduler, before = self._scheduler, self._scheduler.pool.num_blocks
        if num_blocks > before:
            try:
                self._runner.resize(num_blocks, scheduler.pool.kept)
            except (MemoryError, RuntimeError) as error:  # torch's own are of the second kind
                log.warning("no room for a larger cache", extra={"reason": type(error).__name__})
                return before
            scheduler.resize(num_blocks)
        else:
            kept = scheduler.resize(num_blocks)
            self._runner.resize(scheduler.pool.num_blocks, kept)
        return scheduler.pool.num_blocks

    def _parts(self, step: Step) -> list[Step]:
        """The step whole; after a failed one, cut into one sequence each, so that only the culprit fails."""
        if not self._isolate:
            return [step]
        self._isolate = False
        return [Step((work,), int(index < step.num_decodes)) for index, work in enumerate(step.works)]

    def _run_part(self, step: Step, out: Outcomes) -> None:
        yielding = [work for work in step.works if work.yields_token]
        pending = self._masks.submit([work.sequence.reply.guide for work in yielding])
        try:
            entered_s = time.monotonic()
            logits = self._runner.run(step)
            self._spent["model"] += time.monotonic() - entered_s
        except Exception as error:  # any failure of the model must cost one request, never the engine
            log.exception("step failed", extra={"num_sequences": len(step.works)})
            end_if_device_is_lost()
            collect(pending)
            if len(step.works) > 1:
                self._isolate = True  # cache writes are idempotent: the same step runs again, one sequence at a time
            else:
                self._fail(step.works[0].sequence, named(error), out)
            return
        finally:
            self._hand_out(self._postprocessor.tell())  # of the step before, beside a device that runs this one
        masks = dict(zip(yielding, collect(pending), strict=True))
        self._postprocessor.take(step, logits, masks, out, late=self._runner.runs_ahead)

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
