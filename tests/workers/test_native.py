"""The compiled kernels: which families they take, what they compute, how the engine comes to use them."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.workers.decoders import VOCABULARY, decoder_of, in_companies, logits, opened, reference_logits
from workers.engine import Finish, GenerationRequest, LoadSpec, SamplingParams, TokenPrompt
from workers.text import proving
from workers.text.describe import NotSupported, describe
from workers.text.directory import read_directory
from workers.text.loader import load
from workers.text.native import build
from workers.text.native.runner import agree, probe
from workers.text.opening import open_native, open_recipe, open_runner, open_text_engine, recipe_of


@pytest.fixture
def no_kernels_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOSTLER_KERNELS_DIR", str(tmp_path))
    return tmp_path


def _borrowed_library(directory: Path) -> Path:
    """The kernels that the user's cache has, in a cache of the test's own: recipes lie beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HOSTLER_KERNELS_DIR")
        library = build.build()
    return Path(shutil.copy(library, directory / library.name))


def test_every_tiny_architecture_runs_in_the_kernels_and_agrees(tiny_model_of_each_architecture: Path) -> None:
    loaded, _ = opened(tiny_model_of_each_architecture)
    torch.testing.assert_close(logits(decoder_of(loaded, "float32")), reference_logits(loaded), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("weights", "worst"), [("bfloat16", 0.05), ("int8", 0.1), ("int4", 0.6)])
def test_narrow_weights_stay_near_the_wide_ones(tiny_model: Path, weights: str, worst: float) -> None:
    loaded, _ = opened(tiny_model)
    expected = reference_logits(loaded)
    error = (logits(decoder_of(loaded, weights)) - expected).norm() / expected.norm()
    assert 0 < float(error) < worst


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_a_row_is_computed_alike_in_any_company_and_by_any_number_of_threads(tiny_model: Path, weights: str) -> None:
    loaded, _ = opened(tiny_model)
    alone, *others = in_companies(loaded, weights, ((1, 1), (1, 3), (2, 1), (2, 3), (3, 3), (2, 9)))
    for other in others:
        np.testing.assert_array_equal(other, alone)


def test_what_an_earlier_owner_left_in_a_block_reaches_nobody(tiny_model: Path) -> None:
    loaded, _ = opened(tiny_model)
    clean, used = decoder_of(loaded, "float32"), decoder_of(loaded, "float32")
    steps = probe(VOCABULARY)
    for step in steps:
        used.decoder.step(
            tokens=step.tokens,
            positions=step.positions,
            sequences=step.sequences,
            tables=step.tables,
            logit_rows=step.logit_rows,
            num_threads=1,
            override_rows=np.arange(step.tokens.size, dtype=np.int32),
            overrides=np.full((step.tokens.size, loaded.text_config.hidden_size), np.nan, np.float32),
        )
    torch.testing.assert_close(logits(used), logits(clean), atol=0, rtol=0)


def test_a_disagreement_is_noticed(tiny_model: Path) -> None:
    loaded, _ = opened(tiny_model)
    expected = reference_logits(loaded)
    with torch.no_grad():
        loaded.decoder.rotary_emb.inv_freq.mul_(1.05)
    got = logits(decoder_of(loaded, "float32"))
    assert not agree(got, expected, "float32")
    assert agree(expected + 1e-6, expected, "float32")
    assert not agree(torch.full_like(expected, float("nan")), expected, "int4")


def test_an_unknown_family_is_left_to_transformers(tiny_model: Path) -> None:
    loaded, _ = opened(tiny_model)
    loaded.text_config.model_type = "novel"
    with pytest.raises(NotSupported, match="novel"):
        describe(loaded.decoder, loaded.head, loaded.text_config)


def test_a_model_taken_by_the_kernels_keeps_no_second_copy_of_its_weights(tiny_model: Path) -> None:
    loaded, _ = opened(tiny_model)
    loaded.free_weights()
    assert sum(p.numel() for p in loaded.decoder.parameters()) == 0


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_what_was_proved_once_is_packed_straight_from_the_files(
    tiny_model_of_each_architecture: Path, weights: str, no_kernels_yet: Path
) -> None:
    library = _borrowed_library(no_kernels_yet)
    path = tiny_model_of_each_architecture
    spec = LoadSpec(
        model="tiny", path=str(path), dtype="float32", num_threads=1, quantize="int8" if weights == "int8" else ""
    )
    directory = read_directory(spec)
    assert open_recipe(directory, spec, library, lambda *_: None) is None
    expected = logits(open_native(directory, load(spec, lambda *_: None, directory), spec, library))
    again = open_recipe(directory, spec, library, lambda *_: None)
    assert again is not None
    loaded, runner = again
    torch.testing.assert_close(logits(runner), expected, atol=0, rtol=0)
    assert loaded.model is None
    assert loaded.facts.architecture.endswith("ForCausalLM")


def test_a_recipe_is_not_followed_once_the_files_changed(
    tiny_model: Path, tmp_path: Path, no_kernels_yet: Path
) -> None:
    library = _borrowed_library(no_kernels_yet)
    path = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    spec = LoadSpec(model="tiny", path=str(path), dtype="float32", num_threads=1)
    directory = read_directory(spec)
    open_native(directory, load(spec, lambda *_: None, directory), spec, library)
    assert open_recipe(directory, spec, library, lambda *_: None) is not None
    os.utime(path / "model.safetensors", ns=(1, 1))
    assert open_recipe(directory, spec, library, lambda *_: None) is None


def test_neither_the_first_load_nor_a_later_one_imports_a_model_definition(tiny_model: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_model, tmp_path / "model")
    script = f"""
import asyncio, sys
from workers.engine import LoadSpec
from workers.text.opening import open_text_engine

async def main():
    spec = LoadSpec(model="tiny", path={str(path)!r}, dtype="float32", num_threads=1)
    engine = await open_text_engine(spec, lambda *_: None)
    await engine.close()
    return engine.runner, "transformers.modeling_utils" in sys.modules, engine.facts.loads_lighter

print(*asyncio.run(main()))
"""
    build.build()

    def told() -> list[str]:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=100)
        return done.stdout.split()

    assert [told(), told()] == [["native", "False", "False"]] * 2


@pytest.mark.parametrize("how", ["not started", "killed"])
def test_where_the_kernels_cannot_be_proved_apart_they_are_proved_here(
    how: str, tiny_model: Path, no_kernels_yet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _borrowed_library(no_kernels_yet)
    killed = Path(shutil.which("sh") or "/bin/sh")
    python = no_kernels_yet / "python"
    python.write_text(f"#!{killed}\nkill -9 $$\n")
    python.chmod(0o755 if how == "killed" else 0o644)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr("workers.text.opening.is_worth_it", lambda _recipe: True)
    spec = LoadSpec(model="tiny", path=str(tiny_model), dtype="float32", num_threads=1)
    _, runner, _ = open_runner(read_directory(spec), spec, lambda *_: None)
    assert runner.name == "native"


def test_a_model_without_a_recipe_is_tried_once(
    tiny_model: Path, no_kernels_yet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = _borrowed_library(no_kernels_yet)
    spec = LoadSpec(model="tiny", path=str(tiny_model), dtype="float32", num_threads=1)
    path = recipe_of(library, read_directory(spec), spec)
    monkeypatch.setattr(proving, "_DEFINITIONS", "not imported here")
    assert proving.is_worth_it(path)
    monkeypatch.setattr("workers.text.native.recipe.draft", lambda *_: None)
    assert not proving.prove(spec)
    assert not proving.is_worth_it(path)


async def test_a_load_that_wrote_a_recipe_says_that_the_next_one_needs_less(
    tiny_model: Path, no_kernels_yet: Path
) -> None:
    _borrowed_library(no_kernels_yet)
    spec = LoadSpec(model="tiny", path=str(tiny_model), dtype="float32", num_threads=1)
    seen = []
    for _ in range(2):
        engine = await open_text_engine(spec, lambda *_: None)
        seen.append((engine.runner, engine.facts.loads_lighter))
        await engine.close()
    assert seen == [("native", True), ("native", False)]


@pytest.mark.timeout(300)
async def test_the_engine_serves_at_once_and_goes_over_to_the_kernels_when_they_are_compiled(
    tiny_model: Path, no_kernels_yet: Path
) -> None:
    spec = LoadSpec(model="tiny", path=str(tiny_model), dtype="float32", num_threads=1)
    engine = await open_text_engine(spec, lambda *_: None)
    request = GenerationRequest(
        TokenPrompt((5, 6, 7)), sampling=SamplingParams(temperature=0, ignore_eos=True), max_tokens=3000
    )

    async def tokens() -> list[str]:
        return [event.text async for event in engine.generate(request) if not isinstance(event, Finish)]

    try:
        assert engine.runner == "eager"
        across = await tokens()
        async with asyncio.timeout(240):
            while engine.runner != "native":
                await asyncio.sleep(0.05)
        assert await tokens() == across
    finally:
        await engine.close()


async def test_without_a_compiler_the_engine_serves_all_the_same(
    tiny_model: Path, no_kernels_yet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    spec = LoadSpec(model="tiny", path=str(tiny_model), dtype="float32", num_threads=1)
    engine = await open_text_engine(spec, lambda *_: None)
    try:
        request = GenerationRequest(TokenPrompt((5, 6)), sampling=SamplingParams(temperature=0), max_tokens=4)
        events = [event async for event in engine.generate(request)]
        assert isinstance(events[-1], Finish)
        assert engine.runner == "eager"
    finally:
        await engine.close()
    with pytest.raises(build.CannotBuild, match="nowhere"):
        build.build()


@pytest.mark.timeout(300)
async def test_quantized_weights_wait_for_the_kernels(tiny_model: Path, no_kernels_yet: Path) -> None:
    stages = []
    spec = LoadSpec(model="tiny", path=str(tiny_model), dtype="float32", num_threads=1, quantize="int8")
    engine = await open_text_engine(spec, lambda stage, *_: stages.append(stage))
    await engine.close()
    assert engine.runner == "native"
    assert stages[0] == "compile"


@pytest.mark.parametrize("kind", ["int8", "int4"])
async def test_quantized_weights_answer_with_and_without_kernels(
    tiny_model: Path, kind: str, runner_name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if runner_name == "eager":
        monkeypatch.setenv("HOSTLER_KERNELS_DIR", str(tmp_path))
        monkeypatch.setenv("CXX", "/nowhere/c++")
    else:
        build.build()
    spec = LoadSpec(model="tiny", path=str(tiny_model), dtype="float32", num_threads=1, quantize=kind)
    engine = await open_text_engine(spec, lambda *_: None)
    try:
        assert engine.runner == runner_name
        request = GenerationRequest(
            TokenPrompt((5, 6)), sampling=SamplingParams(temperature=0, ignore_eos=True), max_tokens=8
        )
        finish = [event async for event in engine.generate(request)][-1]
        assert isinstance(finish, Finish)
        assert finish.num_completion_tokens == 8
    finally:
        await engine.close()
