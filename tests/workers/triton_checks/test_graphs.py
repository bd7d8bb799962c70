"""Recorded decode steps against the definition that they are recorded from; a recording on the CPU is a closure."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import tiny
from tests.workers.test_text_engine import generated_ids, random_prompts, reference
from tests.workers.triton_checks.compiling import KERNELS
from tests.workers.triton_checks.place import ON_CPU
from workers.engine import LoadSpec
from workers.text.attention import PagedCache
from workers.text.directory import LoadedModel
from workers.text.eager import open_eager
from workers.text.engine import TextEngine
from workers.text.gpu import narrow
from workers.text.gpu.fused import fuse
from workers.text.gpu.graphs import GraphedRunner, agrees, open_graphed, probe, reference_for, sizes_for
from workers.text.kv_cache import blocks_for
from workers.text.linear import QuantizedLinear, quantize
from workers.text.loader import load
from workers.text.threads import Threads

pytestmark = pytest.mark.skipif(not ON_CPU, reason="recordings are stood in for on the CPU alone")

CPU = torch.device("cpu")
# They tell the host what the device found, which stops a recording.
_SYNCHRONIZING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"}


class Recorder:
    """Records by keeping the function: a replay runs it again."""

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0

    def __call__(self, forward: Callable[[], None]) -> Callable[[], None]:
        forward()
        self.num_recorded += 1
        with NothingCrosses():
            forward()

        def replay() -> None:
            self.num_replayed += 1
            forward()

        return replay


class NothingCrosses(TorchDispatchMode):
    """Fails where the host asks for a value, or makes a tensor of one, while a step runs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        assert name not in _SYNCHRONIZING, f"{name} waits for the device"
        assert name != "aten::lift_fresh", "a tensor is made of a host's value"
        return func(*args, **(kwargs or {}))


def _granite() -> Any:
    from transformers import GraniteConfig, GraniteForCausalLM

    scales = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0}
    sizes = {key: value for key, value in tiny.SIZES.items() if key != "head_dim"}
    return GraniteForCausalLM(GraniteConfig(**sizes, **scales, attention_multiplier=0.3))


def _smollm3() -> Any:
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    return SmolLM3ForCausalLM(SmolLM3Config(**tiny.SIZES, no_rope_layers=[1, 0]))


def _gemma() -> Any:
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(**tiny.SIZES))


_FAMILIES = {"granite": _granite, "smollm3": _smollm3, "gemma": _gemma}


def loaded_from(path: Path, **fields: Any) -> tuple[LoadedModel, LoadSpec]:
    spec = LoadSpec(model="tiny", path=str(path), dtype="float32", num_threads=1, **fields)
    return load(spec, lambda *_: None), spec


def graphed(loaded: LoadedModel, recorder: Recorder, max_running: int = 6, *, fused: bool = True) -> GraphedRunner:
    return GraphedRunner(
        loaded.model,
        PagedCache(loaded.kv, loaded.dtype, CPU),
        Threads(1, 1),
        fuse=partial(fuse, loaded.decoder, loaded.head, loaded.text_config) if fused else None,
        max_blocks=blocks_for(loaded.kv.max_context_tokens),
        max_running=max_running,
        record=recorder,
    )


@pytest.mark.parametrize("fused", [False, True])
def test_recorded_steps_agree_with_the_definition(tiny_model_of_each_architecture: Path, fused: bool) -> None:
    loaded, _ = loaded_from(tiny_model_of_each_architecture)
    recorder = Recorder()
    runner = graphed(loaded, recorder, fused=fused)
    assert runner.name == ("fused" if fused else "graphs")
    plain = reference_for(loaded)
    steps = probe(1024)
    for step in steps:
        torch.testing.assert_close(runner.run_packed(step), plain.run_packed(step), atol=1e-4, rtol=1e-4)
    assert (recorder.num_recorded, recorder.num_replayed) == (2, 4)  # of three and of two rows
    assert agrees(runner, plain, 1024)


@pytest.mark.parametrize("kind", ["granite", "smollm3", "gemma"])
def test_families_with_ways_of_their_own(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    """Scaled embeddings, residuals and logits; layers without rotary positions; GELU and norms that add one."""
    directory = Path(shutil.copytree(tiny_model, tmp_path / kind))
    torch.manual_seed(0)
    _FAMILIES[kind]().save_pretrained(directory)
    loaded, _ = loaded_from(directory)
    runner = graphed(loaded, Recorder())
    assert runner.name == "fused"
    plain = reference_for(loaded)
    for step in probe(tiny.VOCABULARY):
        torch.testing.assert_close(runner.run_packed(step), plain.run_packed(step), atol=1e-4, rtol=1e-4)


def test_fused_weights_exist_once_and_serve_the_definition_as_before(tiny_model: Path) -> None:
    loaded, _ = loaded_from(tiny_model)
    plain, step = reference_for(loaded), probe(1024)[0]
    before = plain.run_packed(step)
    assert fuse(loaded.decoder, loaded.head, loaded.text_config) is not None
    layer = loaded.decoder.layers[0]
    for parts in (
        (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
        (layer.mlp.gate_proj, layer.mlp.up_proj),
    ):
        storages = {part.weight.untyped_storage().data_ptr() for part in parts}
        assert len(storages) == 1
        assert parts[0].weight.untyped_storage().nbytes() == sum(part.weight.nbytes for part in parts)
    torch.testing.assert_close(plain.run_packed(step), before, atol=0, rtol=0)


def test_a_fused_layer_is_four_products_and_five_kernels(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, _ = loaded_from(tiny_model)
    runner = graphed(loaded, Recorder())
    launched: Counter[str] = Counter()

    class StandIn:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **__: launched.update([self._name])

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
            launched.update([func.name().partition(".")[0]])
            return func(*args, **(kwargs or {}))

    for module, name in KERNELS:
        monkeypatch.setattr(module, name, StandIn(name))
    for size in (3, 4):
        with Counting():
            runner.run_packed(probe(1024)[size])
    layers = loaded.kv.num_layers
    steps = 2 * 3  # each is run twice to be recorded, and once to be replayed
    assert launched["aten::linear"] == (4 * layers + 1) * steps
    kernels = sum(launched[name] for _, name in KERNELS)
    assert kernels == (5 * layers + 1) * steps
    assert launched["aten::mul"] + launched["aten::add"] <= 6 * steps, "angles of the rotary positions alone"


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])  # with biases and without
def test_quantized_layers_are_fused_too(
    architecture: str, kind: str, tiny_model_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, _ = loaded_from(tiny_model_of(architecture))
    quantize(loaded.decoder, kind)
    plain = reference_for(loaded)
    steps = probe(1024)
    expected = [plain.run_packed(step) for step in steps]
    assert narrow.use(loaded.model) == 7 * loaded.kv.num_layers
    monkeypatch.setattr(QuantizedLinear, "widened", None)  # not once from here on
    runner = graphed(loaded, Recorder())
    assert runner.name == "fused"
    for step, wanted in zip(steps, expected, strict=True):
        torch.testing.assert_close(runner.run_packed(step), wanted, atol=1e-4, rtol=1e-4)


def test_layers_of_different_kinds_are_recorded_as_they_are(tiny_model: Path) -> None:
    loaded, _ = loaded_from(tiny_model)
    attention = loaded.decoder.layers[0].self_attn
    attention.q_proj = QuantizedLinear.of(attention.q_proj, "int8")
    runner = graphed(loaded, Recorder())
    assert runner.name == "graphs"
    assert agrees(runner, reference_for(loaded), 1024)


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
    *steps, last = probe(1024)
    for step in steps:
        before = runner.run_packed(step)
    beside = runner.run_packed(last)
    kept = {block: block for block in range(16)}
    runner.resize(32, kept)
    torch.testing.assert_close(runner.run_packed(steps[-1]), before, atol=1e-4, rtol=1e-4)
    assert recorder.num_recorded == 3
    runner.move_to_host(loaded.facts)
    runner.move_to_device(loaded.kv, CPU)
    assert runner.name == "fused"
    for step in steps:
        after = runner.run_packed(step)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(runner.run_packed(last), beside, atol=1e-4, rtol=1e-4)


def test_a_recording_that_goes_wrong_is_found_out(tiny_model: Path) -> None:
    loaded, _ = loaded_from(tiny_model)

    class Stale(Recorder):
        def __call__(self, forward: Callable[[], None]) -> Callable[[], None]:
            forward()
            return lambda: None

    plain = reference_for(loaded)
    assert not agrees(graphed(loaded, Stale()), plain, 1024)


async def test_without_a_device_to_record_on_the_definition_serves_as_it_was(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded, spec = loaded_from(tiny_model)
    assert open_graphed(loaded, Threads(1, 1), 4) is None
    assert caplog.text.count("not recorded") == 2
    (prompt,) = random_prompts(1, 900, 40)
    engine = TextEngine(loaded, spec, open_eager(loaded, spec))
    try:
        assert await generated_ids(engine, prompt, 10) == reference(tiny_model, prompt, 10)
    finally:
        await engine.close()


@pytest.mark.parametrize(("most", "largest"), [(1, 1), (3, 4), (16, 16), (17, 24), (1000, 256)])
def test_the_largest_recording_holds_everybody(most: int, largest: int) -> None:
    assert sizes_for(most)[-1] == largest
