"""Models whose layers choose among experts, in the kernels and through their definition."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import tiny
from tests.workers.decoders import decoder_of, in_companies, logits, opened, reference_logits
from tests.workers.test_text_engine import generated_ids, random_prompts, reference
from workers.engine import LoadSpec
from workers.text.directory import read_directory
from workers.text.loader import load
from workers.text.native import build
from workers.text.native.runner import agree
from workers.text.opening import open_native, open_recipe


@pytest.fixture(params=sorted(tiny.WITH_EXPERTS))
def model(request: pytest.FixtureRequest) -> Path:
    return tiny.tiny_model(request.param)


def test_the_kernels_agree_with_the_definition(model: Path) -> None:
    loaded, _ = opened(model)
    torch.testing.assert_close(logits(decoder_of(loaded, "float32")), reference_logits(loaded), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
def test_narrow_experts_stay_near_the_wide_ones(model: Path, weights: str) -> None:
    loaded, _ = opened(model)
    assert agree(logits(decoder_of(loaded, weights)), reference_logits(loaded), weights, routed=True)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_a_row_is_computed_alike_in_any_company(model: Path, weights: str) -> None:
    loaded, _ = opened(model)
    alone, *others = in_companies(loaded, weights, ((1, 1), (1, 2), (2, 3), (1, 9)))
    for other in others:
        np.testing.assert_array_equal(other, alone)


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_what_was_proved_once_is_packed_straight_from_the_files(model: Path, weights: str) -> None:
    quantize = "int8" if weights == "int8" else ""
    spec = LoadSpec(model="tiny", path=str(model), dtype="float32", num_threads=1, quantize=quantize)
    directory, library = read_directory(spec), build.build()
    expected = logits(open_native(directory, load(spec, lambda *_: None, directory), spec, library))
    again = open_recipe(directory, spec, library, lambda *_: None)
    assert again is not None
    torch.testing.assert_close(logits(again[1]), expected, atol=0, rtol=0)


async def test_greedy_equals_generate_alone_and_in_a_shifting_batch(
    model: Path, open_engine: Callable[..., Any]
) -> None:
    prompts = random_prompts(12, 900, 70)
    expected = [reference(model, p, 20) for p in prompts]
    async with open_engine(model, max_running=4, prefill_chunk_tokens=16) as engine:
        assert [await generated_ids(engine, p, 20) for p in prompts[:3]] == expected[:3]
        assert await asyncio.gather(*(generated_ids(engine, p, 20) for p in prompts)) == expected
