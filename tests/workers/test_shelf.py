"""Weights of a sleeper that a worker on another device takes over: the same replies, from memory, whoever lives on."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.models.tiny_vision import tiny_vision_model
from tests.workers.test_sleeping import ids_of
from tests.workers.test_tiers import TEXT, Worker, started
from workers import memory
from workers.engine import LoadSpec
from workers.text import linear, shelf
from workers.text.directory import LoadedModel
from workers.text.eager import ModelRunner, open_eager
from workers.text.loader import load
from workers.text.native.runner import probe
from workers.text.opening import open_text_engine

PROMPT = "Once upon a time there was"


def opened(path: Path, quantize: str = "") -> tuple[LoadedModel, ModelRunner]:
    spec = LoadSpec(model="m", path=str(path), dtype="float32", num_threads=1, quantize=quantize)
    loaded = load(spec, lambda *_: None)
    if quantize:
        loaded = loaded.told(quantize, loaded.facts.weight_bytes - linear.quantize(loaded.decoder, quantize))
    return loaded, open_eager(loaded, spec)


def without_weights(path: Path, copy: Path) -> Path:
    shutil.copytree(path, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    return copy


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Worker]:
    async with started(tmp_path) as blank:
        yield blank


def logits_of(runner: ModelRunner) -> torch.Tensor:
    return torch.cat([runner.run_packed(step) for step in probe(900)])


@pytest.mark.parametrize("quantize", ["", "int8"])
def test_who_takes_over_computes_the_same(tiny_model_of_each_architecture: Path, quantize: str) -> None:
    loaded, runner = opened(tiny_model_of_each_architecture, quantize)
    expected = logits_of(runner)
    before = [tensor.clone() for tensor in shelf.tensors_of(loaded.model)]
    path = runner.move_to_host(loaded.facts)
    module, facts = shelf.take_over(path)
    shelf.move(module, torch.device("cpu"))
    assert facts == loaded.facts
    assert type(module) is type(loaded.model)
    taken = ModelRunner(module, runner._cache, runner._threads)
    runner.move_to_device(loaded.kv, loaded.device)
    taken._cache = runner._cache
    for module in (taken._model, loaded.model):
        assert all(torch.equal(now, was) for now, was in zip(shelf.tensors_of(module), before, strict=True))
    torch.testing.assert_close(logits_of(taken), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits_of(runner), expected, atol=1e-4, rtol=1e-4)


def test_a_model_that_was_loaded_straight_to_its_device_can_be_taken_over(tiny_model: Path) -> None:
    spec = LoadSpec(model="m", path=str(tiny_model), dtype="float32", num_threads=1)
    loaded = load(spec, lambda *_: None, split={"device_map": {"": "cpu"}})
    module, _ = shelf.take_over(open_eager(loaded, spec).move_to_host(loaded.facts))
    assert torch.equal(module.get_input_embeddings().weight, loaded.model.get_input_embeddings().weight)


async def test_a_worker_serves_what_sleeps_in_another_process(tiny_model: Path, tmp_path: Path, worker: Worker) -> None:
    (tmp_path / "other").mkdir()
    async with started(tmp_path / "other") as usual:
        await usual.load(TEXT, tiny_model, dtype="float32")
        expected = await usual.reply(PROMPT)
    loaded, runner = opened(tiny_model)
    path = runner.move_to_host(loaded.facts)
    # Without the shelf there is nothing to load: what replies has come from this process's memory.
    directory = without_weights(tiny_model, tmp_path / "model")
    await worker.load(TEXT, directory, dtype="float32", shelf=path)
    runner.move_to_device(loaded.kv, loaded.device)
    assert await worker.reply(PROMPT) == expected
    report = await worker.report()
    assert report.info.weight_bytes == loaded.facts.weight_bytes
    assert report.info.num_parameters == loaded.facts.num_parameters


def garbage(tmp_path: Path) -> str:
    path = tmp_path / "garbage"
    path.write_bytes(random.Random(1).randbytes(4096) + (100).to_bytes(8, "little"))
    return str(path)


@pytest.mark.parametrize("path", ["/proc/self/fd/9999", "/dev/null", "garbage", "another model"])
async def test_weights_that_cannot_be_taken_over_are_read_from_their_files(
    path: str, tiny_model: Path, tmp_path: Path, worker: Worker
) -> None:
    holder: Any = None
    if path == "garbage":
        path = garbage(tmp_path)
    elif path == "another model":
        holder = shelf.Shelf(nn.Linear(4, 4), "facts of another kind")
        path = holder.path
    await worker.load(TEXT, tiny_model, dtype="float32", shelf=path)
    with_files = await worker.reply(PROMPT)
    assert with_files
    assert (await worker.report()).info.num_parameters > 1000


async def test_a_vision_model_is_taken_over_with_its_eyes(tmp_path: Path, worker: Worker) -> None:
    path = tiny_vision_model("llava")
    loaded, runner = opened(path)
    where = runner.move_to_host(loaded.facts)
    await worker.load(TEXT, without_weights(path, tmp_path / "model"), dtype="float32", shelf=where)
    assert (await worker.report()).info.supports_images


def test_another_users_memory_is_not_unpickled(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs a file of another user, which only root can make")
    mine = shelf.Shelf(nn.Linear(2, 2), None)
    theirs = tmp_path / "theirs"
    theirs.write_bytes(Path(mine.path).read_bytes())
    assert isinstance(shelf.take_over(str(theirs))[0], nn.Linear)
    os.chown(theirs, 12345, 12345)
    with pytest.raises(shelf.CannotTakeOver, match="12345"):
        shelf.take_over(str(theirs))


def test_what_was_taken_over_outlives_the_sleeper() -> None:
    script = (
        "import sys, torch; from torch import nn; from workers.text.shelf import Shelf\n"
        "torch.manual_seed(1); shelf = Shelf(nn.Linear(300, 300), 'facts'); print(shelf.path, flush=True); input()"
    )
    sleeper = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert sleeper.stdout is not None
    path = sleeper.stdout.readline().strip()
    module, facts = shelf.take_over(path)
    sleeper.kill()
    sleeper.wait(10)
    assert facts == "facts"
    shelf.move(module, torch.device("cpu"))
    torch.manual_seed(1)
    expected = nn.Linear(300, 300)
    assert torch.equal(module.weight, expected.weight)
    with pytest.raises(shelf.CannotTakeOver):
        shelf.take_over(path)


class Tied(nn.Module):
    """Two names for one parameter, a buffer that shares another one's bytes, one that is transposed, and one empty."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3000, 3000, bias=False), nn.Linear(3000, 3000, bias=False)
        self.second.weight = self.first.weight
        self.one = nn.Buffer(torch.arange(12.0).reshape(3, 4).T)
        self.other, self.none = nn.Buffer(self.one.data), nn.Buffer(torch.empty(0, 5))


def test_what_shares_memory_lies_there_once_and_shares_it_afterwards() -> None:
    module, meter = Tied(), memory.MemoryMeter()
    weight = module.first.weight.clone()
    memory.give_back()
    before = meter.look().device
    waiting = shelf.Shelf(module, None)
    assert 36_000_000 < waiting.num_bytes < 36_010_000
    memory.give_back()
    assert abs(meter.look().device - before) < 9_000_000, "the shelf is counted, and what lay elsewhere is freed"
    taken, _ = shelf.take_over(waiting.path)
    waiting.clear(module, torch.device("cpu"))
    assert not waiting.path
    for one in (module, taken):
        assert one.first.weight is one.second.weight
        assert torch.equal(one.first.weight, weight)
        assert one.one.data_ptr() == one.other.data_ptr()
        assert one.one.stride() == (1, 4)
        assert torch.equal(one.one, torch.arange(12.0).reshape(3, 4).T)
        assert one.none.shape == (0, 5)
    del taken, one
    memory.give_back()
    assert abs(meter.look().device - before) < 9_000_000


def test_a_module_that_cannot_be_pickled_wakes_where_it_fell_asleep() -> None:
    module = nn.Linear(3, 3)
    module.register_forward_hook(lambda _, inputs, output: output + 1)
    before = module.weight.clone()
    waiting = shelf.Shelf(module, None)
    assert waiting.path == ""
    waiting.clear(module, torch.device("cpu"))
    assert torch.equal(module.weight, before)


def test_without_memory_for_it_the_module_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    module, fds = nn.Linear(3, 3), len(os.listdir("/proc/self/fd"))
    where = module.weight.data_ptr()
    monkeypatch.setattr(shelf, "_populate", refuse)
    with pytest.raises(OSError, match="allocate"):
        shelf.Shelf(module, None)
    assert module.weight.data_ptr() == where
    assert len(os.listdir("/proc/self/fd")) == fds


@pytest.mark.gpu
async def test_on_a_gpu_another_engine_takes_over(tiny_model: Path) -> None:
    spec = LoadSpec(model="m", path=str(tiny_model), devices=("cuda:0",), dtype="float32", kv_cache_bytes=2**26)
    engine = await open_text_engine(spec, lambda *_: None)
    taken = None
    try:
        before = await ids_of(engine, (5, 6, 7), 20)
        path = await engine.sleep()
        taken = await open_text_engine(replace(spec, shelf=path), lambda *_: None)
        assert await ids_of(taken, (5, 6, 7), 20) == before
        await engine.wake(spec)
        assert await ids_of(engine, (5, 6, 7), 20) == before
    finally:
        await engine.close()
        if taken is not None:
            await taken.close()
