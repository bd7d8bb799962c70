"""A model asleep beside one GPU and wanted on another: its weights are taken over, and every way that ends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from hostler.errors import Unavailable
from hostler.lifecycle.v1 import lifecycle_pb2 as life
from hostler.placement.v1 import placement_pb2 as pb

from orchestrator import events
from orchestrator.devices import Device
from orchestrator.models import Footprint
from tests.orchestrator.conftest import MB, FakeEffects, FakeWorker, Rig

Start = Callable[..., Awaitable[Rig]]
SHELF = "/proc/7/fd/9"
GPUS = tuple(Device(f"cuda:{i}", "cuda", f"GPU {i}", 0, 100 * MB, uuid=f"GPU-{i}") for i in range(2))


async def asleep_beside_a_busy_gpu(start: Start, effects: FakeEffects, shelf: str = SHELF) -> tuple[Rig, FakeWorker]:
    """Model a sleeps; its GPU is taken by a busy one, the other is free."""
    effects.stored["b"] = Footprint(90 * MB)
    rig = await start({"name": "a", "device": None}, {"name": "b", "device": "cuda:0"}, sleep=1000 * MB)
    rig.scheduler.post(events.DevicesChanged(GPUS, "two GPUs", {"": 1000 * MB}))
    await rig.settle()
    await rig.ensure("a")
    sleeper = rig.worker("a")
    assert visible(sleeper) == "GPU-0"
    await rig.advance_heard(3)
    assert await rig.scheduler.sleep("a") == 1
    await rig.settle()
    sleeper.say(state=life.WORKER_STATE_ASLEEP, shelf=shelf)
    assert (await rig.ensure("b")).ready is not None
    rig.worker("b").say(num_running=1)
    await rig.settle()
    return rig, sleeper


def visible(worker: FakeWorker) -> str:
    assert worker.request is not None
    return worker.request.environment["CUDA_VISIBLE_DEVICES"]


def shelf_of(worker: FakeWorker) -> str:
    assert worker.request is not None
    return worker.request.shelf


async def test_a_worker_on_another_gpu_takes_over_what_sleeps(start: Start, effects: FakeEffects) -> None:
    rig, sleeper = await asleep_beside_a_busy_gpu(start, effects)
    gate = effects.hold("load:a")
    caller = await rig.ensure("a")
    taker = rig.worker("a")
    assert (visible(taker), shelf_of(taker)) == ("GPU-1", SHELF)
    assert not sleeper.killed, "its memory is still needed"
    effects.clock_s += 3.0
    gate.set()
    await rig.settle()
    assert caller.ready is not None
    assert caller.ready.generation == taker.generation
    assert any("from host memory" in progress.detail for progress in caller.progress)
    assert sleeper.killed
    (measured,) = (m for key, m in effects.experience.by_key.items() if m.hand_over_s)
    assert (measured.hand_over_s, measured.load_s) == (3.0, 0.0)


async def test_where_nothing_can_be_taken_over_the_files_are_read_and_the_sleeper_goes(
    start: Start, effects: FakeEffects
) -> None:
    rig, sleeper = await asleep_beside_a_busy_gpu(start, effects, shelf="")
    caller = await rig.ensure("a")
    assert caller.ready is not None
    assert shelf_of(rig.worker("a")) == ""
    assert sleeper.killed


async def test_the_sleeper_stays_while_another_model_wants_its_host_memory(start: Start, effects: FakeEffects) -> None:
    rig, sleeper = await asleep_beside_a_busy_gpu(start, effects)
    effects.hold("load:a")
    await rig.ensure("a")
    view = rig.scheduler._cluster.view(effects.clock_s)
    (asleep,) = (holder for holder in view.holders if holder.model == "a" and not holder.parts)
    assert asleep.pinned
    assert not sleeper.killed


async def test_a_sleeper_that_dies_while_it_is_taken_over_is_not_missed(start: Start, effects: FakeEffects) -> None:
    rig, sleeper = await asleep_beside_a_busy_gpu(start, effects)
    gate = effects.hold("load:a")
    caller = await rig.ensure("a")
    sleeper.break_stream(Unavailable("it died"))
    await rig.settle()
    gate.set()
    await rig.settle()
    assert caller.ready is not None
    assert caller.ready.generation == rig.worker("a").generation


async def test_after_a_hand_over_that_failed_the_files_are_read(start: Start, effects: FakeEffects) -> None:
    rig, sleeper = await asleep_beside_a_busy_gpu(start, effects)
    effects.load_errors = [Unavailable("no")]
    caller = await rig.ensure("a")
    await rig.advance_heard(2)
    assert caller.ready is not None
    assert shelf_of(rig.worker("a")) == ""
    assert sleeper.killed


async def test_who_gives_up_waiting_leaves_the_sleeper_asleep(start: Start, effects: FakeEffects) -> None:
    rig, sleeper = await asleep_beside_a_busy_gpu(start, effects)
    effects.hold("spawn")
    caller = await rig.ensure("a")
    await caller.leave()
    await rig.settle()
    assert not sleeper.killed
    assert (await rig.routes())["a"].state == pb.MODEL_STATE_ASLEEP
