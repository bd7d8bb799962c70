"""A model split over several processes against the same model in one: replies, faults, ends."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hostler.channel import call_metadata, open_channel
from hostler.errors import HostlerError, ModelLoadFailed
from hostler.inference.v1 import inference_pb2 as pb
from hostler.inference.v1 import inference_pb2_grpc
from hostler.lifecycle.v1 import lifecycle_pb2 as life
from hostler.lifecycle.v1 import lifecycle_pb2_grpc

from tests.workers.test_text_engine import GREEDY, collect, generated_ids, random_prompts, reference, reference_model
from workers import memory
from workers.engine import AdapterSource, ChatPrompt, GenerationRequest, LoadSpec, SamplingParams, TokenPrompt
from workers.text import linear
from workers.text.attention import PagedCache
from workers.text.eager import ModelRunner
from workers.text.engine import TextEngine
from workers.text.loader import load
from workers.text.native.runner import probe
from workers.text.opening import open_text_engine
from workers.text.parallel.opening import open_split
from workers.text.threads import Threads

pytestmark = pytest.mark.journey

VOCABULARY = 1024


@dataclass
class Split:
    """An opened split model that outlives the engines of several tests."""

    path: Path
    spec: LoadSpec
    loaded: Any
    runner: Any
    lost: list[str]
    runs_ahead = False

    @property
    def name(self) -> str:
        return str(self.runner.name)

    def run(self, step: Any) -> torch.Tensor:
        return self.runner.run(step)

    def resize(self, num_blocks: int, kept: Mapping[int, int]) -> None:
        self.runner.resize(num_blocks, kept)

    def seconds(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Nothing: the fixture closes the runner."""

    @asynccontextmanager
    async def engine(self, num_blocks: int = 0, **limits: Any) -> AsyncIterator[TextEngine]:
        loaded = self.loaded
        if num_blocks:
            loaded = replace(loaded, kv=replace(loaded.kv, num_blocks=num_blocks, max_context_tokens=num_blocks * 16))
        engine = TextEngine(loaded, replace(self.spec, **limits), self)
        try:
            yield engine
        finally:
            await engine.close()


def opened(path: Path, num_parts: int = 2, **options: Any) -> Split:
    spec = LoadSpec(model="tiny", path=str(path), devices=("cpu",) * num_parts, num_threads=num_parts)
    spec = replace(spec, **{"dtype": "float32", **options})
    lost: list[str] = []
    loaded, runner = open_split(spec, lambda *_: None, lost.append)
    return Split(path, spec, loaded, runner, lost)


def saved(directory: Path, tokenizer_from: Path, model: Any) -> Path:
    """A model with random weights, and the tiny tokenizer."""
    torch.manual_seed(0)
    for file in tokenizer_from.glob("*token*"):
        shutil.copy(file, directory)
    model.init_weights()
    model.save_pretrained(directory)
    return directory


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": None,
}


def fused(directory: Path, tiny: Path) -> Path:
    """Phi-3: one projection to queries, keys and values, another to both halves of the gate."""
    from transformers import Phi3Config, Phi3ForCausalLM

    return saved(directory, tiny, Phi3ForCausalLM(Phi3Config(**SIZES)))


def experts(directory: Path, tiny: Path) -> Path:
    """Qwen3 with four experts, two for each token."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(**SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    return saved(directory, tiny, Qwen3MoeForCausalLM(config))


def odd_heads(directory: Path, tiny: Path) -> Path:
    """Nine heads, three key-value heads, and a vocabulary and a width that do not divide either."""
    from transformers import LlamaConfig, LlamaForCausalLM

    odd = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "intermediate_size": 97}
    return saved(directory, tiny, LlamaForCausalLM(LlamaConfig(**{**SIZES, **odd, "vocab_size": 1031})))


def few_key_heads(directory: Path, tiny: Path) -> Path:
    """Qwen 2 with one key-value head and biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return saved(directory, tiny, Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "num_key_value_heads": 1})))


@pytest.mark.parametrize("build", [fused, experts, odd_heads, few_key_heads])
async def test_greedy_equals_generate_where_layers_are_cut_otherwise(
    build: Callable[[Path, Path], Path], tmp_path: Path, tiny_model: Path
) -> None:
    path = build(tmp_path, tiny_model)
    prompts = random_prompts(4, 900, 40)
    expected = [reference(path, p, 12) for p in prompts]
    model = opened(path)
    try:
        async with model.engine(prefill_chunk_tokens=16) as engine:
            assert await asyncio.gather(*(generated_ids(engine, p, 12) for p in prompts)) == expected
    finally:
        model.runner.close()


async def test_four_parts_of_two_key_heads_share_them(tiny_model: Path) -> None:
    prompts = random_prompts(4, 900, 40)
    model = opened(tiny_model, num_parts=4)
    try:
        assert model.loaded.facts.kv_bytes_per_token == 2 * 2 * 4 * 16 * 4  # each head is kept twice
        async with model.engine() as engine:
            got = await asyncio.gather(*(generated_ids(engine, p, 12) for p in prompts))
    finally:
        model.runner.close()
    assert got == [reference(tiny_model, p, 12) for p in prompts]


@pytest.mark.parametrize(("kind", "least_cosine"), [("int8", 0.999), ("int4", 0.99999)])
def test_quantized_parts_compute_what_the_quantized_model_does(
    kind: str, least_cosine: float, tiny_model_of: Callable[[str], Path]
) -> None:
    """int4 has a scale for each 32 inputs, so cutting changes nothing; int8 one for each row of a part."""
    path = tiny_model_of("llama")
    model = opened(path, quantize=kind)
    try:
        got = torch.cat([model.runner.run_packed(step) for step in probe(VOCABULARY)])
    finally:
        model.runner.close()
    assert model.loaded.facts.dtype == kind
    assert model.loaded.facts.weight_bytes < model.loaded.facts.num_parameters * 4 * 0.8
    whole = load(replace(model.spec, devices=("cpu",)), lambda *_: None)
    linear.quantize(whole.decoder, kind)
    runner = ModelRunner(whole.model, PagedCache(whole.kv, whole.dtype, whole.device), Threads(1, 1))
    expected = torch.cat([runner.run_packed(step) for step in probe(VOCABULARY)])
    assert float(torch.nn.functional.cosine_similarity(got, expected, dim=1).min()) > least_cosine


async def test_a_follower_that_dies_is_told_at_once_and_no_request_hangs(tiny_model: Path) -> None:
    told = threading.Event()
    spec = LoadSpec(model="tiny", path=str(tiny_model), devices=("cpu", "cpu"), dtype="float32", num_threads=2)
    loaded, runner = open_split(spec, lambda *_: None, lambda _: told.set())
    engine = TextEngine(loaded, spec, runner)
    endless = GenerationRequest(TokenPrompt((5, 6)), sampling=SamplingParams(temperature=0, ignore_eos=True))
    running = asyncio.create_task(collect(engine, endless))
    async with asyncio.timeout(20):
        while engine.stats().num_steps < 3:
            await asyncio.sleep(0)
    (pid,) = runner.pids
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        assert await asyncio.to_thread(told.wait, 5)
        with pytest.raises(HostlerError):
            await running
        with pytest.raises(HostlerError):
            await collect(engine, endless)
        await engine.close()
    assert not torch.distributed.is_initialized()


def test_what_a_follower_cannot_load_is_said_by_the_load(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        shutil.copy(file, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelLoadFailed, match="cannot be loaded"):
        opened(tmp_path)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"devices": ("cpu", "cuda:0")}, "different kinds"),
        ({"devices": ("cuda:1", "cuda:1")}, "same device twice"),
        ({"devices": ("cpu", "cpu"), "adapters": (AdapterSource("a", "/nowhere"),)}, "adapters"),
    ],
)
def test_what_no_split_model_can_do_is_refused_by_name(tiny_model: Path, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelLoadFailed, match=why):
        open_split(LoadSpec(model="tiny", path=str(tiny_model), **options), lambda *_: None)


def test_an_architecture_without_a_plan_is_refused_on_the_cpu_with_the_reason(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2))
    path = saved(tmp_path, tiny_model, model)
    with pytest.raises(ModelLoadFailed, match="2 CPU devices: transformers has no tensor-parallel plan"):
        open_split(LoadSpec(model="tiny", path=str(path), devices=("cpu", "cpu")), lambda *_: None)


@asynccontextmanager
async def worker(socket: Path, path: Path) -> AsyncIterator[tuple[subprocess.Popen[bytes], list[int], Any]]:
    """A worker process with the model over two CPU devices: the process, its followers' ids, its channel."""
    command = [sys.executable, "-m", "workers", "--socket", str(socket)]
    process = await asyncio.to_thread(subprocess.Popen, command)
    channel = open_channel(f"unix:{socket}")
    try:
        await asyncio.wait_for(channel.channel_ready(), 30)
        request = life.LoadRequest(
            model="tiny", engine=life.ENGINE_KIND_TEXT, path=str(path), devices=["cpu", "cpu"], dtype="float32"
        )
        stub = lifecycle_pb2_grpc.LifecycleServiceStub(channel)
        async for _ in stub.Load(request, metadata=call_metadata(request_id="l", generation=1)):
            pass
        yield process, [child.pid for child in psutil.Process(process.pid).children()], channel
    finally:
        await channel.close()
        process.kill()
        process.wait(10)


async def test_a_worker_serves_a_split_model_and_takes_its_followers_along_when_killed(
    tmp_path: Path, tiny_model: Path
) -> None:
    async with worker(tmp_path / "w.sock", tiny_model) as (process, followers, channel):
        assert len(followers) == 1
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = pb.GenerateRequest(text="hello", max_tokens=4)
        call = stub.Generate(request, metadata=call_metadata(request_id="r", generation=1))
        assert [event async for event in call][-1].HasField("finish")
        follower = psutil.Process(followers[0])
        process.kill()
        await asyncio.to_thread(follower.wait, 5)


async def test_a_worker_ends_when_one_of_its_followers_dies(tmp_path: Path, tiny_model: Path) -> None:
    async with worker(tmp_path / "w.sock", tiny_model) as (process, followers, _):
        os.kill(followers[0], signal.SIGKILL)
        assert await asyncio.wait_for(asyncio.to_thread(process.wait), 5) == 1


async def test_a_split_model_sleeps_without_followers_and_wakes_with_new_ones(tiny_model: Path) -> None:
    spec = LoadSpec("tiny", str(tiny_model), devices=("cpu", "cpu"), dtype="float32", num_threads=2)
    prompt, meter = random_prompts(1, 900, 40)[0], memory.MemoryMeter()
    strangers = set(psutil.Process().children())  # Servers that other tests share.

    def followers() -> set[psutil.Process]:
        return set(psutil.Process().children()) - strangers

    engine = await open_text_engine(spec, lambda *_: None)
    try:
        assert await generated_ids(engine, prompt, 12) == reference(tiny_model, prompt, 12)
        (follower,) = followers()
        assert follower.nice() == psutil.Process().nice()
        assert meter.look().resident > psutil.Process().memory_info().rss + follower.memory_info().rss // 2
        await engine.sleep()
        assert not followers()
        await engine.wake(spec)
        assert [child.nice() for child in followers()] == [psutil.Process().nice()]
        assert await generated_ids(engine, prompt, 12) == reference(tiny_model, prompt, 12)
    finally:
        await engine.close()
    assert not followers()


@pytest.mark.real_model
async def test_the_real_model_with_nine_heads_says_the_same_in_two_parts(smollm2: Path) -> None:
    model = opened(smollm2, kv_cache_bytes=2**28)
    try:
        async with model.engine() as engine:
            prompt = tuple(await engine.tokenize(ChatPrompt([{"role": "user", "content": "What is the sea?"}])))
            assert await generated_ids(engine, prompt, 16) == reference(smollm2, prompt, 16)
    finally:
        model.runner.close()


# A process is in one group of ranks at a time: what follows shares one model, and must come last.


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def split(request: pytest.FixtureRequest, tiny_model_of: Callable[[str], Path]) -> Iterator[Split]:
    model = opened(tiny_model_of(request.param))
    yield model
    model.runner.close()
    assert model.lost == [], "closing is no loss"


async def test_greedy_equals_generate_alone_and_in_a_shifting_batch_of_chunked_prompts(split: Split) -> None:
    prompts = random_prompts(16, 900, 70)
    expected = [reference(split.path, p, 20) for p in prompts]
    async with split.engine(max_running=6, prefill_chunk_tokens=16) as engine:
        assert [await generated_ids(engine, p, 20) for p in prompts[:3]] == expected[:3]

        async def later(index: int) -> list[int]:
            await asyncio.sleep(random.Random(index).random() * 0.3)
            return await generated_ids(engine, prompts[index], 20)

        assert await asyncio.gather(*(later(i) for i in range(16))) == expected


async def test_greedy_equals_generate_when_sequences_are_preempted(split: Split) -> None:
    prompts = random_prompts(8, 900, 60)
    expected = [reference(split.path, p, 40) for p in prompts]
    async with split.engine(num_blocks=10, max_running=8) as engine:
        assert await asyncio.gather(*(generated_ids(engine, p, 40) for p in prompts)) == expected


async def test_a_second_turn_takes_over_what_every_part_has_cached(split: Split) -> None:
    turn = tuple(range(100, 220))
    async with split.engine() as engine:
        second = (*turn, *await generated_ids(engine, turn, 20), 7, 8, 9)
        request = GenerationRequest(TokenPrompt(second), sampling=GREEDY, max_tokens=10, top_logprobs=0)
        _, finish, deltas = await collect(engine, request)
    assert [p.token_id for d in deltas for p in d.logprobs] == reference(split.path, second, 10)
    assert finish.num_cached_tokens == (len(second) - 4) // 16 * 16


async def test_logprobs_are_those_of_the_whole_model(split: Split) -> None:
    prompt = tuple(range(40, 70))
    request = GenerationRequest(TokenPrompt(prompt), sampling=GREEDY, max_tokens=8, top_logprobs=5)
    async with split.engine() as engine:
        _, _, deltas = await collect(engine, request)
    points = [p for d in deltas for p in d.logprobs]
    ids = torch.tensor([[*prompt, *(p.token_id for p in points)]])
    with torch.inference_mode():
        logits = reference_model(split.path)(ids).logits[0, len(prompt) - 1 : -1]
    for row, point in zip(torch.log_softmax(logits, dim=-1), points, strict=True):
        assert point.logprob == pytest.approx(float(row[point.token_id]), abs=1e-3)
        values, _ = torch.topk(row, 5)
        assert [t.logprob for t in point.top] == pytest.approx(values.tolist(), abs=1e-3)


async def test_a_cache_that_shrinks_and_grows_on_every_part_loses_no_reply(split: Split) -> None:
    prompts = random_prompts(4, 900, 60)
    expected = [reference(split.path, p, 60) for p in prompts]
    async with split.engine() as engine:
        block_bytes = 16 * engine.facts.kv_bytes_per_token
        before = engine.stats().kv_reserved_bytes
        running = [asyncio.create_task(generated_ids(engine, p, 60)) for p in prompts]
        async with asyncio.timeout(20):
            while not engine.stats().num_running:
                await asyncio.sleep(0)
        assert await engine.resize(40 * block_bytes) == 40 * block_bytes
        assert await engine.resize(before) == before
        assert await asyncio.gather(*running) == expected


async def test_facts_are_those_of_the_whole_model(split: Split) -> None:
    whole = reference_model(split.path)
    facts = split.loaded.facts
    assert facts.num_parameters == sum(p.numel() for p in whole.parameters())
    assert facts.num_parameters * 4 <= facts.weight_bytes < facts.num_parameters * 4 * 1.05, "norms are on both"
    assert facts.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, size, float32
