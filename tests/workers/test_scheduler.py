"""The scheduler and its blocks under random arrivals, departures and cache sizes, without a model."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hostler.errors import ContextLengthExceeded, Overloaded
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.test_pace import taught
from workers.engine import GenerationRequest, TextPrompt
from workers.text.kv_cache import BLOCK_TOKENS, BlockPool, PrefixHashes
from workers.text.pace import Pace
from workers.text.sampler import RowSampling
from workers.text.scheduler import Scheduler, SchedulerLimits, Step
from workers.text.sequence import Sequence


def sequence(serial: int, prompt: list[int], reply: int, scope: bytes = b"") -> Sequence:
    request = GenerationRequest(TextPrompt("x"))
    return Sequence(
        request,
        RowSampling(seed=1),
        list(prompt),
        len(prompt),
        reply,
        lambda ids: "a" * len(ids),
        serial=serial,
        hashes=PrefixHashes(scope),
    )


def scheduler_of(max_running: int, num_blocks: int, context: int, chunk: int) -> Scheduler:
    limits = SchedulerLimits(max_running, 100, context)
    return Scheduler(limits, BlockPool(num_blocks), Pace(max_chunk=chunk))


class Memory:
    """What the cache's positions hold: each is a token and everything before it, so a wrong or stale block shows."""

    def __init__(self) -> None:
        self.content: dict[tuple[int, int], int] = {}

    def run(self, step: Step) -> None:
        for work in step.works:
            ids = [*work.sequence.token_ids[: work.end], *work.draft]
            past = 0
            for position, token in enumerate(ids):
                place = (work.sequence.blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS)
                past = hash((past, token))
                if position >= work.start:
                    self.content[place] = past
                else:
                    assert self.content.get(place) == past, "a step reads what was never computed, or somebody else's"

    def move(self, kept: dict[int, int], num_blocks: int) -> None:
        """Keep only what a resize says, where it says."""
        assert all(0 <= new < num_blocks for new in kept.values())
        assert len(set(kept.values())) == len(kept)
        assert not {new for old, new in kept.items() if old != new} & set(kept), "a move onto what has yet to move"
        self.content = {(kept[b], slot): past for (b, slot), past in self.content.items() if b in kept}


def blocks_are_accounted_for(scheduler: Scheduler) -> None:
    pool = scheduler.pool
    held = [block for s in scheduler.running for block in s.blocks]
    assert all(not s.blocks for s in scheduler.waiting)
    assert pool.num_in_use == len(set(held)), "a block is leaked, or held twice by one sequence"
    assert 0 <= pool.num_available <= pool.num_blocks


@settings(max_examples=250)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 90), st.integers(1, 40), st.integers(0, 20), st.integers(0, 2)),
        min_size=1,
        max_size=20,
    ),
    leaves=st.dictionaries(st.integers(0, 19), st.integers(0, 60), max_size=8),
    lost_at=st.integers(0, 200),
    resizes=st.dictionaries(st.integers(0, 80), st.integers(1, 30), max_size=6),
    max_running=st.integers(1, 6),
    num_blocks=st.integers(8, 24),
    chunk=st.integers(16, 64),
    seed=st.integers(0, 2**16),
)
def test_everyone_is_served_or_leaves_and_no_block_leaks(
    requests: list[tuple[int, int, int, int]],
    leaves: dict[int, int],
    lost_at: int,
    resizes: dict[int, int],
    max_running: int,
    num_blocks: int,
    chunk: int,
    seed: int,
) -> None:
    rng = random.Random(seed)
    scheduler, memory = scheduler_of(max_running, num_blocks, 128, chunk), Memory()
    # Few different prompts, so that prefixes are shared; each scope has its own. Nobody asks for more than fits alone.
    everyone = [
        sequence(
            i,
            [7 + scope] * (prompt // 2) + [i % 3] * (prompt - prompt // 2),
            min(reply, scheduler.longest_tokens - prompt),
            bytes([scope]),
        )
        for i, (prompt, reply, _, scope) in enumerate(requests)
    ]
    arrivals = sorted(range(len(requests)), key=lambda i: requests[i][2])
    done: set[int] = set()
    for clock in range(20_000):
        while arrivals and requests[arrivals[0]][2] <= clock:
            newcomer = arrivals.pop(0)
            if scheduler.fits(everyone[newcomer]):  # as the engine does
                scheduler.add(everyone[newcomer])
            else:
                done.add(newcomer)
        for index, when in leaves.items():
            if when == clock and index < len(everyone) and index not in done and index not in arrivals:
                scheduler.remove(everyone[index])
                done.add(index)
        if clock == lost_at:
            scheduler.preempt_all()
            memory = Memory()
        if clock in resizes:
            held = {block for s in scheduler.running for block in s.blocks}
            memory.move(scheduler.resize(resizes[clock]), scheduler.pool.num_blocks)
            assert scheduler.pool.num_blocks >= max(resizes[clock], len(held))
        step = scheduler.schedule()
        assert step or not (scheduler.running or scheduler.waiting), "there is work and nobody runs"
        blocks_are_accounted_for(scheduler)
        assert len(scheduler.running) <= max_running
        memory.run(step)
        for work in step.works:
            if not work.yields_token:
                scheduler.computed(work, 0)
                continue
            right = rng.randint(0, len(work.draft))
            alive = True
            for token in [*work.draft[:right], rng.randrange(3)]:
                work.sequence.accept(token, is_eos=False, logprob=None)
                alive = work.sequence.finish_reason is None
                if not alive:
                    break
            scheduler.computed(work, min(right, work.sequence.num_tokens - work.end - 1))
            work.sequence.draft = tuple(rng.randrange(3) for _ in range(rng.randint(0, 3)))
            if not alive:
                scheduler.remove(work.sequence)
                done.add(work.sequence.serial)
        if len(done) == len(everyone):
            break
    assert len(done) == len(everyone), "somebody was never served"
    assert not scheduler.running
    assert not scheduler.waiting
    assert scheduler.pool.num_in_use == 0


def serve_alone(scheduler: Scheduler, one: Sequence) -> int:
    """Run one sequence to its first token; return how many prompt tokens were computed."""
    scheduler.add(one)
    computed = 0
    while one.num_generated_tokens == 0:
        step = scheduler.schedule()
        computed += step.num_prompt_tokens
        for work in step.works:
            if work.yields_token:
                one.accept(3, is_eos=False, logprob=None)
            scheduler.computed(work, 0)
    scheduler.remove(one)
    return computed


def test_a_prompt_with_a_known_beginning_computes_only_the_rest() -> None:
    scheduler = scheduler_of(4, 64, 512, 512)
    prompt = list(range(100))
    assert serve_alone(scheduler, sequence(0, prompt, 1)) == 100
    later = sequence(1, [*prompt, *range(200, 220)], 1)
    assert serve_alone(scheduler, later) == 120 - 96
    assert later.num_cached_tokens == 96
    # The same prompt again must still run its last token.
    assert serve_alone(scheduler, sequence(2, prompt[:96], 1)) == 16


def test_prompts_of_different_scopes_share_nothing() -> None:
    scheduler = scheduler_of(4, 64, 512, 512)
    prompt = list(range(100))
    serve_alone(scheduler, sequence(0, prompt, 1, b"alice"))
    assert serve_alone(scheduler, sequence(1, prompt, 1, b"bob")) == 100
    assert serve_alone(scheduler, sequence(2, prompt, 1, b"alice")) == 4


def test_inputs_that_are_not_tokens_are_part_of_the_prefix() -> None:
    tokens = [1] * 48
    cat, dog = PrefixHashes(b"", [(20, b"cat")]).of(tokens, 3), PrefixHashes(b"", [(20, b"dog")]).of(tokens, 3)
    assert cat[0] == dog[0]
    assert cat[1] != dog[1]
    assert cat[2] != dog[2]


def test_known_blocks_are_evicted_when_their_memory_is_needed_the_oldest_first() -> None:
    scheduler = scheduler_of(1, 8, 128, 512)
    first, second = list(range(33)), list(range(500, 533))
    serve_alone(scheduler, sequence(0, first, 1))
    serve_alone(scheduler, sequence(1, second, 1))
    serve_alone(scheduler, sequence(2, [9] * 80, 1))
    assert serve_alone(scheduler, sequence(3, second, 1)) == 1
    assert serve_alone(scheduler, sequence(4, first, 1)) == 33


def test_a_long_prompt_goes_in_chunks_while_others_decode() -> None:
    scheduler = scheduler_of(4, 64, 500, 16)
    talker, reader = sequence(0, [1] * 4, 50), sequence(1, [2] * 100, 5)
    scheduler.add(talker)
    (work,) = scheduler.schedule().works
    scheduler.computed(work, 0)
    talker.accept(5, is_eos=False, logprob=None)
    scheduler.add(reader)
    chunks = []
    while reader.num_computed_tokens < 100:
        step = scheduler.schedule()
        assert [w.sequence for w in step.works[: step.num_decodes]] == [talker]
        for work in step.works:
            if work.sequence is talker:
                talker.accept(5, is_eos=False, logprob=None)
            else:
                chunks.append(work.num_rows)
            scheduler.computed(work, 0)
    assert max(chunks) == 16
    assert sum(chunks) == 100


def test_a_prompt_that_can_never_fit_is_refused() -> None:
    scheduler = scheduler_of(2, 20, 500, 16)
    with pytest.raises(ContextLengthExceeded, match="320"):
        scheduler.check(320, 0)
    with pytest.raises(ContextLengthExceeded):
        scheduler_of(2, 200, 500, 16).check(500, 0)


def test_a_full_queue_is_refused() -> None:
    scheduler = Scheduler(SchedulerLimits(2, 3, 1000), BlockPool(32), Pace())
    with pytest.raises(Overloaded):
        scheduler.check(5, 5)


def steps_of(scheduler: Scheduler, count: int) -> list[list[tuple[int, int]]]:
    """Run steps; return the prompts' serials and rows in each. Nobody finishes."""
    seen = []
    for _ in range(count):
        step = scheduler.schedule()
        seen.append([(work.sequence.serial, work.num_rows) for work in step.works[step.num_decodes :]])
        for work in step.works:
            if work.yields_token:
                work.sequence.accept(5, is_eos=False, logprob=None)
            scheduler.computed(work, 0)
    return seen


def test_a_burst_is_taken_in_at_full_pace_to_its_last() -> None:
    scheduler = scheduler_of(17, 500, 512, 512)
    scheduler.pace = taught(0.010, 0.0004)
    for i in range(16):
        scheduler.add(sequence(i, [i] * 80, 100))
    full = scheduler.pace.chunk_tokens(0, 16, 0) // 80
    steps = steps_of(scheduler, 5)
    assert [len(step) for step in steps[:-1]] == [full] * (16 // full)
    scheduler.add(sequence(16, [16] * 80, 100))
    assert 0 < steps_of(scheduler, 1)[0][0][1] < 20, "one that comes later finds streams that are older"


def test_a_prompt_that_a_step_could_hold_whole_is_not_cut_to_fill_one() -> None:
    scheduler = scheduler_of(16, 500, 512, 200)
    scheduler.pace.observe(0, 64, 0.001)
    for i, length in enumerate((80, 80, 80, 250, 30)):
        scheduler.add(sequence(i, [i] * length, 100))
    assert steps_of(scheduler, 3) == [[(0, 80), (1, 80)], [(2, 80), (3, 120)], [(3, 130), (4, 30)]]


def test_what_a_step_computes_for_one_is_not_computed_for_others_beside_it() -> None:
    scheduler = scheduler_of(16, 500, 512, 512)
    scheduler.pace.observe(0, 64, 0.001)
    for i, beginning in enumerate((7, 7, 9, 7)):
        scheduler.add(sequence(i, [beginning] * 80 + [100 + i] * 8, 100))
    assert steps_of(scheduler, 2) == [[(0, 88), (2, 88)], [(1, 8), (3, 8)]]
    assert [s.serial for s in scheduler.running] == [0, 2, 1, 3]


def test_what_people_wait_for_is_admitted_before_batches() -> None:
    scheduler = scheduler_of(1, 64, 500, 512)
    first, batch, other_batch, person = (sequence(i, [i] * 20, 5) for i in range(4))
    for one in (batch, other_batch):
        one.request = replace(one.request, batch=True)
    for one in (first, batch, other_batch, person):
        scheduler.add(one)
    order = []
    while scheduler.waiting or scheduler.running:
        (work,) = scheduler.schedule().works
        order.append(work.sequence)
        scheduler.remove(work.sequence)
    assert order == [first, person, batch, other_batch]


def test_shrinking_frees_known_blocks_first_and_stops_at_what_is_held() -> None:
    scheduler = scheduler_of(2, 32, 512, 512)
    serve_alone(scheduler, sequence(0, list(range(100)), 1))
    runner = sequence(1, [7] * 40, 5)
    scheduler.add(runner)
    scheduler.schedule()
    scheduler.resize(1)
    assert scheduler.pool.num_blocks == len(runner.blocks) == 3
    assert max(runner.blocks) < 3
    assert scheduler.pool.num_backed == 3
    scheduler.remove(runner)
    scheduler.resize(32)
    assert (scheduler.pool.num_available, scheduler.pool.num_backed) == (32, 3)
    assert serve_alone(scheduler, sequence(2, list(range(100)), 1)) == 100


def test_known_prefixes_survive_a_resize_that_has_room_for_them() -> None:
    scheduler = scheduler_of(2, 32, 512, 512)
    serve_alone(scheduler, sequence(0, [9] * 200, 1))
    prompt = list(range(100))
    serve_alone(scheduler, sequence(1, prompt, 1))
    scheduler.resize(8)
    assert scheduler.pool.num_blocks == 8
    assert serve_alone(scheduler, sequence(2, prompt, 1)) == 4
