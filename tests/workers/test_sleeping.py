"""Sleep, wake and resize inside the text engine, with either runner: replies stay what they were, memory goes back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostler.errors import Unavailable

from tests.models.adapters import write_adapter
from tests.workers.test_native import decoder_of
from tests.workers.test_native import opened as tiny
from workers import memory
from workers.engine import AdapterSource, Finish, GenerationRequest, LoadSpec, SamplingParams, TokenPrompt
from workers.text.attention import PagedCache
from workers.text.describe import describe
from workers.text.eager import open_eager
from workers.text.kv_cache import KVShape
from workers.text.loader import load
from workers.text.native import build
from workers.text.native.decoder import NativeDecoder
from workers.text.native.runner import probe
from workers.text.opening import open_text_engine

KEPT = {0: 0, 7: 1, 3: 3}


@pytest.fixture
def opened(runner_name: str, engine_device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    if runner_name == "native":
        build.build()
    else:
        monkeypatch.setenv("HOSTLER_KERNELS_DIR", str(tmp_path))
        monkeypatch.setenv("CXX", "/nowhere/c++")

    @asynccontextmanager
    async def open_one(path: Path, **fields: Any) -> AsyncIterator[tuple[Any, LoadSpec]]:
        chosen = {"devices": (engine_device,), "dtype": "float32", "num_threads": 1, **fields}
        spec = LoadSpec(model="tiny", path=str(path), **chosen)
        engine = await open_text_engine(spec, lambda *_: None)
        assert engine.runner == runner_name or engine_device != "cpu"
        try:
            yield engine, spec
        finally:
            await engine.close()

    return open_one


async def ids_of(engine: Any, prompt: tuple[int, ...], max_tokens: int, adapter: str = "") -> list[int]:
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    request = GenerationRequest(
        TokenPrompt(prompt), sampling=sampling, max_tokens=max_tokens, top_logprobs=0, adapter=adapter
    )
    return [p.token_id async for e in engine.generate(request) if not isinstance(e, Finish) for p in e.logprobs]


async def test_replies_after_sleep_are_those_from_before(
    tiny_model_of_each_architecture: Path, opened: Callable[..., Any]
) -> None:
    prompt = tuple(random.Random(1).randrange(900) for _ in range(50))
    async with opened(tiny_model_of_each_architecture) as (engine, spec):
        before = await ids_of(engine, prompt, 30)
        for _ in range(2):
            await engine.sleep()
            with pytest.raises(Unavailable):
                await ids_of(engine, prompt, 1)
            await engine.wake(spec)
            assert await ids_of(engine, prompt, 30) == before


async def test_adapters_wake_with_their_model(tiny_model: Path, tmp_path: Path, opened: Callable[..., Any]) -> None:
    directory = write_adapter(tmp_path / "adapter", tiny_model, seed=1)
    async with opened(tiny_model, adapters=(AdapterSource("a", str(directory)),)) as (engine, spec):
        before = [await ids_of(engine, (5, 6, 7), 20, adapter) for adapter in ("", "a")]
        assert before[0] != before[1]
        await engine.sleep()
        await engine.wake(spec)
        assert [await ids_of(engine, (5, 6, 7), 20, adapter) for adapter in ("", "a")] == before


async def test_replies_are_the_same_while_the_cache_grows_and_shrinks(
    tiny_model: Path, opened: Callable[..., Any]
) -> None:
    rng = random.Random(2)
    prompts = [tuple(rng.randrange(900) for _ in range(rng.randint(1, 60))) for _ in range(16)]
    async with opened(tiny_model, max_running=6) as (engine, _):
        block = 16 * engine.facts.kv_bytes_per_token
        expected = [await ids_of(engine, p, 40) for p in prompts]
        running = asyncio.gather(*(ids_of(engine, p, 40) for p in prompts))
        sizes = set()
        while not running.done():
            became = await engine.resize(block * rng.choice((1, 9, 14, 30, 200)))
            sizes.add(became)
            assert engine.stats().kv_reserved_bytes == became
            assert engine.stats().kv_allocated_bytes <= became
            await asyncio.sleep(0.002)
        assert await running == expected
        assert len(sizes) > 1
        assert engine.stats().kv_used_bytes == 0
        assert await engine.resize(0) == 4 * block
        assert engine.stats().kv_allocated_bytes <= 4 * block


def test_shrinking_the_kernels_cache_returns_its_memory(tiny_model: Path) -> None:
    loaded, _ = tiny(tiny_model)
    num_blocks, blocks_bytes = 2048, 2048 * 16 * loaded.kv.bytes_per_token(4)
    decoder = NativeDecoder(
        build.build(),
        describe(loaded.decoder, loaded.head, loaded.text_config),
        weights="float32",
        cache="float32",
        num_blocks=num_blocks,
        num_threads=1,
    )
    meter, rows = memory.MemoryMeter(), np.arange(num_blocks, dtype=np.int32)
    empty = meter.look().device
    zeros, ones = np.zeros_like(rows), np.ones_like(rows)
    decoder.step(
        tokens=zeros,
        positions=zeros,
        sequences=np.stack((rows, ones, zeros, rows), axis=1),
        tables=rows[:, None].copy(),
        logit_rows=np.zeros(1, np.int32),
        num_threads=1,
    )
    full = meter.look().device
    assert full - empty > 0.9 * blocks_bytes
    decoder.resize(4, {9: 0})
    assert full - meter.look().device > 0.9 * blocks_bytes
    decoder.close()


def test_the_kernels_serve_on_after_their_cache_shrank_and_grew(tiny_model: Path) -> None:
    loaded, _ = tiny(tiny_model)
    runner = decoder_of(loaded, "float32")
    for step in probe(1024):
        step.tables[:] = 15 - step.tables
        runner.run_packed(step)
    before = torch.cat([runner.run_packed(step) for step in probe(1024)])
    runner.resize(4, {0: 0, 1: 1})
    with pytest.raises(MemoryError):
        runner.resize(10**6, {})
    runner.resize(16, {0: 0, 1: 1})
    torch.testing.assert_close(torch.cat([runner.run_packed(step) for step in probe(1024)]), before, atol=0, rtol=0)


@pytest.mark.parametrize("num_blocks", [4, 20])
def test_a_resized_cache_of_torch_keeps_what_it_must_where_it_must(num_blocks: int) -> None:
    cache = PagedCache(KVShape(2, 2, 4, 8, 128), torch.float32, torch.device("cpu"))
    for layer in range(2):
        for tensor in cache.layer(layer):
            tensor.copy_(torch.arange(8).repeat_interleave(16)[:, None, None].expand_as(tensor) + 100 * layer)
    kept = KEPT if num_blocks == 4 else {block: block for block in range(8)}
    cache.resize(num_blocks, kept)
    for layer in range(2):
        for tensor in cache.layer(layer):
            assert tensor.shape[0] == num_blocks * 16
            for old, new in kept.items():
                assert (tensor[new * 16 : new * 16 + 16] == old + 100 * layer).all()


def test_weights_that_wait_in_host_memory_come_back_as_they_were(tiny_model: Path) -> None:
    spec = LoadSpec(model="tiny", path=str(tiny_model), dtype="float32", num_threads=1)
    loaded = load(spec, lambda *_: None)
    runner = open_eager(loaded, spec)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    tied = loaded.model.get_output_embeddings().weight
    runner.move_to_host(loaded.facts)
    runner.move_to_device(loaded.kv, loaded.device)
    assert tied.data_ptr() == loaded.model.get_input_embeddings().weight.data_ptr()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.gpu
async def test_a_sleeping_model_leaves_the_gpu(tiny_model: Path) -> None:
    spec = LoadSpec(model="tiny", path=str(tiny_model), devices=("cuda:0",), dtype="float32", kv_cache_bytes=2**26)
    engine = await open_text_engine(spec, lambda *_: None)
    try:
        before = await ids_of(engine, (5, 6, 7), 20)
        await engine.sleep()
        memory.give_back()
        assert torch.cuda.memory_reserved() < 2**22
        await engine.wake(spec)
        assert await ids_of(engine, (5, 6, 7), 20) == before
    finally:
        await engine.close()
