"""The scheduler under random arrivals, departures and budgets, without a model."""

from __future__ import annotations

import pytest
from hostler.errors import ContextLengthExceeded, Overloaded
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.engine import GenerationRequest, TextPrompt
from workers.text.sampler import RowSampling
from workers.text.scheduler import Scheduler, SchedulerLimits, Step
from workers.text.sequence import Sequence


def sequence(serial: int, prompt: int, reply: int) -> Sequence:
    request = GenerationRequest(TextPrompt("x"))
    return Sequence(
        request, RowSampling(seed=1), [1] * prompt, prompt, reply, lambda ids: "a" * len(ids), serial=serial
    )


class Slots:
    """What the cache holds: checks that a step reads only what was written, after its moves."""

    def __init__(self) -> None:
        self.content: dict[int, tuple[int, int]] = {}

    def run(self, step: Step) -> None:
        for move in step.moves:
            if move.num_tokens:
                owner, length = self.content[move.source]
                assert length >= move.num_tokens
                self.content[move.target] = (owner, move.num_tokens)
        for work in (*step.decodes, *step.prefills):
            owner, length = self.content.get(work.sequence.slot, (-1, 0))
            assert work.start == 0 or (owner == work.sequence.serial and length >= work.start)
            self.content[work.sequence.slot] = (work.sequence.serial, work.end)


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30), st.integers(0, 20)), min_size=1, max_size=25),
    leaves=st.dictionaries(st.integers(0, 24), st.integers(0, 60), max_size=8),
    max_running=st.integers(1, 6),
    budget=st.integers(100, 300),
    chunk=st.integers(1, 40),
)
def test_everyone_is_served_or_leaves_and_the_budget_holds(
    requests: list[tuple[int, int, int]], leaves: dict[int, int], max_running: int, budget: int, chunk: int
) -> None:
    limits = SchedulerLimits(max_running, 100, budget, 90, chunk)
    scheduler, slots = Scheduler(limits), Slots()
    everyone = [sequence(i, prompt, reply) for i, (prompt, reply, _) in enumerate(requests)]
    arrivals = sorted(range(len(requests)), key=lambda i: requests[i][2])
    done: set[int] = set()
    for clock in range(20_000):
        while arrivals and requests[arrivals[0]][2] <= clock:
            scheduler.add(everyone[arrivals.pop(0)])
        for index, when in leaves.items():
            if when == clock and index < len(everyone) and index not in done and index not in arrivals:
                scheduler.remove(everyone[index])
                done.add(index)
        step = scheduler.schedule()
        slots.run(step)
        assert [s.slot for s in scheduler.running] == list(range(len(scheduler.running)))
        assert len(scheduler.running) <= max_running
        assert sum(w.end - w.start for w in step.prefills) <= chunk
        for work in (*step.decodes, *step.prefills):
            work.sequence.num_computed_tokens = work.end
        assert scheduler.held_tokens <= budget
        for work in (*step.decodes, *step.prefills):
            if work.yields_token:
                work.sequence.accept(5, is_eos=False, logprob=None)
                if work.sequence.finish_reason:
                    scheduler.remove(work.sequence)
                    done.add(work.sequence.serial)
        if len(done) == len(everyone):
            break
    assert len(done) == len(everyone), "somebody was never served"
    assert not scheduler.running
    assert not scheduler.waiting


def test_a_long_prompt_goes_in_chunks_while_others_decode() -> None:
    scheduler = Scheduler(SchedulerLimits(4, 10, 1000, 500, 16))
    talker, reader = sequence(0, 4, 50), sequence(1, 100, 5)
    scheduler.add(talker)
    step = scheduler.schedule()
    talker.num_computed_tokens = step.prefills[0].end
    talker.accept(5, is_eos=False, logprob=None)
    scheduler.add(reader)
    for _ in range(6):
        step = scheduler.schedule()
        assert [w.sequence for w in step.decodes] == [talker]
        assert sum(w.end - w.start for w in step.prefills) <= 16
        for work in (*step.decodes, *step.prefills):
            work.sequence.num_computed_tokens = work.end
        talker.accept(5, is_eos=False, logprob=None)
    assert reader.num_computed_tokens == 96


def test_a_prompt_that_leaves_no_room_is_refused_before_any_work() -> None:
    scheduler = Scheduler(SchedulerLimits(4, 10, 1000, 500, 16))
    with pytest.raises(ContextLengthExceeded, match="500"):
        scheduler.check(500, 0)


def test_a_full_queue_is_refused() -> None:
    scheduler = Scheduler(SchedulerLimits(2, 3, 1000, 500, 16))
    with pytest.raises(Overloaded):
        scheduler.check(5, 5)
