"""Recorded decode steps against the definition that they are recorded from; a recording on the CPU is a closure."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are defined

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="test_triton.py brings it")

from tests.workers.test_text_engine import generated_ids, random_prompts, reference
from workers.engine import LoadSpec
from workers.text.attention import PagedCache
from workers.text.directory import LoadedModel
from workers.text.eager import open_eager
from workers.text.engine import TextEngine
from workers.text.graphs import GraphedRunner, agrees, open_graphed, probe, reference_for, sizes_for
from workers.text.kv_cache import blocks_for
from workers.text.loader import load
from workers.text.threads import Threads

CPU = torch.device("cpu")
# They tell the host what the device found, which stops a recording.
_SYNCHRONIZING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"}


class Recorder:
    """Records by keeping the function: a replay runs it again and puts the result where it was."""

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0

    def __call__(self, forward: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        result = forward().clone()
        self.num_recorded += 1
        with NothingCrosses():
            forward()

        def replay() -> None:
            self.num_replayed += 1
            result.copy_(forward())

        return replay, result


class NothingCrosses(TorchDispatchMode):
    """Fails where the host asks for a value, or makes a tensor of one, while a step runs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        assert name not in _SYNCHRONIZING, f"{name} waits for the device"
        assert name != "aten::lift_fresh", "a tensor is made of a host's value"
        return func(*args, **(kwargs or {}))


def loaded_from(path: Path, **fields: Any) -> tuple[LoadedModel, LoadSpec]:
    spec = LoadSpec(model="tiny", path=str(path), dtype="float32", num_threads=1, **fields)
    return load(spec, lambda *_: None), spec


def graphed(loaded: LoadedModel, recorder: Recorder, max_running: int = 6) -> GraphedRunner:
    return GraphedRunner(
        loaded.model,
        PagedCache(loaded.kv, loaded.dtype, CPU, in_place=True),
        Threads(1, 1),
        max_blocks=blocks_for(loaded.kv.max_context_tokens),
        max_running=max_running,
        record=recorder,
    )


def test_recorded_steps_agree_with_the_definition(tiny_model_of_each_architecture: Path) -> None:
    loaded, _ = loaded_from(tiny_model_of_each_architecture)
    recorder = Recorder()
    runner = graphed(loaded, recorder)
    plain = reference_for(loaded.model, loaded.kv, loaded.dtype, CPU)
    steps = probe(1024)
    for step in steps:
        torch.testing.assert_close(runner.run_packed(step), plain.run_packed(step), atol=1e-4, rtol=1e-4)
    assert (recorder.num_recorded, recorder.num_replayed) == (2, 4)  # of three and of two rows
    assert agrees(runner, plain, 1024)


async def test_greedy_equals_generate_in_a_shifting_batch(tiny_model: Path) -> None:
    loaded, spec = loaded_from(tiny_model, max_running=6, prefill_chunk_tokens=16)
    prompts = random_prompts(8, 900, 40)
    recorder = Recorder()
    engine = TextEngine(loaded, spec, graphed(loaded, recorder))
    try:

        async def later(index: int) -> list[int]:
            await asyncio.sleep(0.05 * index)
            return await generated_ids(engine, prompts[index], 10)

        assert await asyncio.gather(*map(later, range(8))) == [reference(tiny_model, p, 10) for p in prompts]
    finally:
        await engine.close()
    assert recorder.num_replayed > 10


def test_the_guard_sees_what_would_stop_a_recording() -> None:
    for crossing in (lambda: bool(torch.ones(2).all()), lambda: torch.ones(2).nonzero(), lambda: torch.tensor([1, 2])):
        with pytest.raises(AssertionError), NothingCrosses():
            crossing()


def test_a_new_cache_takes_new_recordings(tiny_model: Path) -> None:
    loaded, _ = loaded_from(tiny_model)
    recorder = Recorder()
    runner = graphed(loaded, recorder)
    *_, step = probe(1024)
    for earlier in probe(1024):
        before = runner.run_packed(earlier)
    kept = {block: block for block in range(16)}
    runner.resize(32, kept)
    torch.testing.assert_close(runner.run_packed(step), before, atol=1e-4, rtol=1e-4)
    assert recorder.num_recorded == 3
    runner.move_to_host(loaded.facts)
    runner.move_to_device(loaded.kv, CPU)
    for earlier in probe(1024):
        after = runner.run_packed(earlier)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_a_recording_that_goes_wrong_is_found_out(tiny_model: Path) -> None:
    loaded, _ = loaded_from(tiny_model)

    class Stale(Recorder):
        def __call__(self, forward: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
            return (lambda: None), forward().clone()

    plain = reference_for(loaded.model, loaded.kv, loaded.dtype, CPU)
    assert not agrees(graphed(loaded, Stale()), plain, 1024)


async def test_without_a_device_to_record_on_the_definition_serves_as_it_was(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded, spec = loaded_from(tiny_model)
    assert open_graphed(loaded.model, loaded.kv, loaded.dtype, CPU, Threads(1, 1), 4) is None
    assert "serving without graphs" in caplog.text
    (prompt,) = random_prompts(1, 900, 40)
    engine = TextEngine(loaded, spec, open_eager(loaded, spec))
    try:
        assert await generated_ids(engine, prompt, 10) == reference(tiny_model, prompt, 10)
    finally:
        await engine.close()


@pytest.mark.parametrize(("most", "largest"), [(1, 1), (3, 4), (16, 16), (17, 24), (1000, 256)])
def test_the_largest_recording_holds_everybody(most: int, largest: int) -> None:
    assert sizes_for(most)[-1] == largest
