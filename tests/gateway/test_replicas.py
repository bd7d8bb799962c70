"""Which replica gets a request: the pure decision, what it remembers, and both of them in the gateway."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from hostler.inference.v1 import inference_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from gateway.affinity import MAX_BOUNDARIES, Affinity, prefix_hashes
from gateway.balance import Load, choose
from tests.gateway.fakes import World, finish, route

A, B, C = ("unix:/a", 1), ("unix:/b", 2), ("unix:/c", 3)
LONG = "You are a helpful assistant. " * 40


def chat(*texts: str, scope: str = "one", **fields: Any) -> pb.GenerateRequest:
    messages = [
        pb.Message(role=pb.ROLE_USER if n % 2 else pb.ROLE_SYSTEM, parts=[pb.Part(text=t)]) for n, t in enumerate(texts)
    ]
    return pb.GenerateRequest(chat=pb.Chat(messages=messages), cache_scope=scope, **fields)


def test_the_least_loaded_for_its_size_is_chosen() -> None:
    assert choose([Load(A, 3, 16), Load(B, 2, 16)]) == B
    assert choose([Load(A, 3, 32), Load(B, 2, 4)]) == A
    assert choose([Load(A, 9)]) == A


def test_equals_are_told_apart_by_the_prefix_alike_in_every_gateway() -> None:
    loads = [Load(A, 1, 8), Load(B, 1, 8), Load(C, 1, 8)]
    chosen = Counter(choose(loads, prefix=b"%d" % n) for n in range(300))
    assert min(chosen[key] for key in (A, B, C)) > 60
    for number in range(20):
        prefix = b"%d" % number
        assert choose(loads, prefix=prefix) == choose(loads[::-1], prefix=prefix)
        # A replica that comes takes only its own share: nobody moves between the others.
        assert choose(loads, prefix=prefix) in (choose(loads[:2], prefix=prefix), C)


def test_the_one_that_holds_the_prefix_is_kept_until_it_is_clearly_busier() -> None:
    def kept(ours: int, theirs: int, max_running: int = 16) -> bool:
        return choose([Load(A, theirs, max_running), Load(B, ours, max_running)], remembered=B) == B

    assert kept(0, 0)
    assert kept(4, 0)
    assert not kept(5, 0)
    assert kept(9, 5)
    assert not kept(16, 13)  # it would have to wait there
    assert kept(18, 16)  # it would have to wait anywhere
    assert kept(1, 0, max_running=2)
    assert not kept(2, 0, max_running=2)
    assert not kept(1, 0, max_running=1)


def test_a_remembered_replica_that_is_gone_changes_nothing() -> None:
    assert choose([Load(A, 0, 8), Load(B, 1, 8)], remembered=C) == A


@given(
    st.lists(st.tuples(st.integers(0, 64), st.integers(0, 64)), min_size=1, max_size=6),
    st.integers(0, 7),
    st.binary(max_size=100),
)
def test_no_choice_is_clearly_busier_than_the_least_loaded(
    loads: list[tuple[int, int]], remembered: int, prefix: bytes
) -> None:
    replicas = [Load((f"r{n}", n), in_flight, running) for n, (in_flight, running) in enumerate(loads)]
    key = choose(replicas, remembered=(f"r{remembered}", remembered), prefix=prefix)
    chosen = next(load for load in replicas if load.key == key)
    least = min(load.num_in_flight / load.capacity for load in replicas)
    assert chosen.num_in_flight <= least * chosen.capacity + max(1, chosen.capacity // 4)
    assert (
        not chosen.is_full or all(load.is_full for load in replicas) or chosen.num_in_flight / chosen.capacity <= least
    )


def test_a_later_turn_begins_with_the_hashes_of_the_earlier_one() -> None:
    first = prefix_hashes("m", chat(LONG, "hello"))
    second = prefix_hashes("m", chat(LONG, "hello", "hi", "how are you"))
    assert second[: len(first)] == first
    assert len(second) > len(first) == 2
    assert prefix_hashes("m", chat(LONG, "other"))[0] == first[0]


def test_other_scopes_models_adapters_and_tools_share_no_hash() -> None:
    usual = set(prefix_hashes("m", chat(LONG, "hello")))
    with_tools = chat(LONG, "hello")
    with_tools.chat.tools.add(name="f")
    for other in (
        prefix_hashes("m", chat(LONG, "hello", scope="two")),
        prefix_hashes("n", chat(LONG, "hello")),
        prefix_hashes("m", chat(LONG, "hello", adapter="bot")),
        prefix_hashes("m", with_tools),
        prefix_hashes("m", chat(LONG[:-1], "hello")),
    ):
        assert len(other) == 2
        assert usual.isdisjoint(other)


def test_short_prompts_are_not_worth_a_detour_and_long_ones_have_few_boundaries() -> None:
    assert prefix_hashes("m", chat("Be brief.", "hello")) == []
    assert len(prefix_hashes("m", chat(LONG, *["x"] * 100))) == MAX_BOUNDARIES
    assert prefix_hashes("m", pb.GenerateRequest()) == []


def test_plain_prompts_are_known_by_their_first_thousands() -> None:
    text = "word " * 4000
    longer = prefix_hashes("m", pb.GenerateRequest(text=text + "more"))
    assert prefix_hashes("m", pb.GenerateRequest(text=text)) == longer
    assert len(longer) == 2
    assert prefix_hashes("m", pb.GenerateRequest(text="short")) == []
    ids = list(range(300))
    one = prefix_hashes("m", pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids)))
    assert one == prefix_hashes("m", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[*ids, 7])))
    assert len(one) == 1


def test_the_longest_known_beginning_wins_and_the_oldest_are_forgotten() -> None:
    affinity = Affinity(max_remembered=3)
    affinity.remember([b"1", b"2"], A)
    affinity.remember([b"1", b"3"], B)
    assert affinity.recall([b"1", b"2"], {A, B}) == A
    assert affinity.recall([b"1", b"9"], {A, B}) == B
    assert affinity.recall([b"1", b"2"], {B}) == B
    assert affinity.recall([b"9"], {A, B}) is None
    affinity.remember([b"4"], A)
    assert affinity.recall([b"2"], {A, B}) is None


async def test_turns_of_one_conversation_meet_in_one_replica(served: World) -> None:
    other = await served.add_worker("b")
    await served.publish(route(served.worker, other))
    for number in range(6):
        messages = [{"role": "system", "content": LONG}, {"role": "user", "content": f"conversation {number}"}]
        for turn in range(3):
            assert (await served.chat(messages=messages)).status_code == 200
            messages += [{"role": "assistant", "content": "ok"}, {"role": "user", "content": f"turn {turn}"}]
    for worker in (served.worker, other):
        assert len(worker.requests) % 3 == 0


async def test_short_prompts_are_shared_out_among_idle_replicas(served: World) -> None:
    other = await served.add_worker("b")
    await served.publish(route(served.worker, other))
    for _ in range(40):
        await served.chat("hi")
    assert served.worker.requests
    assert other.requests


async def test_a_crowd_with_one_prefix_is_shared_out_all_the_same(served: World) -> None:
    other = await served.add_worker("b")
    await served.publish(route(served.worker, other))
    gate, all_here = asyncio.Event(), asyncio.Event()

    async def hold(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        if served.worker.num_running + other.num_running == 20:
            all_here.set()
        await gate.wait()
        yield finish()

    served.worker.script = other.script = hold
    messages = [{"role": "system", "content": LONG}, {"role": "user", "content": "the same for all"}]
    asked = [asyncio.create_task(served.chat(messages=messages)) for _ in range(20)]
    await asyncio.wait_for(all_here.wait(), 5)
    assert abs(served.worker.num_running - other.num_running) <= 5
    gate.set()
    await asyncio.gather(*asked)
