"""The kernels with each set of instructions that they know, as far as this processor or an emulation has it."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models import tiny
from tests.workers.decoders import VOCABULARY, decoder_of, in_companies, logits, opened, reference_logits
from workers.text.native import build
from workers.text.native.runner import agree, probe

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="sets of instructions of x86-64")

EMULATION = Path(__file__).with_name("emulated_amx.h")
# What a set takes the place of -march=native with or adds to it, and what the processor must have.
SETS: dict[str, tuple[tuple[str, ...], str]] = {
    "SSE": (("-march=x86-64",), "sse2"),
    "AVX2": (("-march=x86-64-v3",), "avx2"),
    "AVX-512": (("-march=x86-64-v4",), "avx512vl"),
    "AVX512-BF16": (("-march=native", "-mno-amx-tile"), "avx512_bf16"),
    "AMX, emulated": (("-march=native", f"-I{build.SOURCES}", "-include", str(EMULATION)), "avx512_bf16"),
    "AMX": (("-march=native",), "amx_bf16"),
}


def _has(flag: str) -> bool:
    return flag in Path("/proc/cpuinfo").read_text(encoding="utf-8").split()


@pytest.fixture(params=SETS)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    flags, needed = SETS[request.param]
    if not _has(needed):
        pytest.skip(f"no {needed} here")
    monkeypatch.setattr(build, "FLAGS", (*(f for f in build.FLAGS if f != "-march=native"), *flags))
    return build.build()


def _llama(path: Path, tokenizer: Path, seed: int, **sizes: object) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, max_position_embeddings=256, **sizes)
    LlamaForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Widths that fill no whole tile of any kind: 80 and 132 inputs, heads of 48, five of them to one key head."""
    return _llama(
        tmp_path_factory.mktemp("odd"), tiny_model, 3, hidden_size=80, intermediate_size=132, num_hidden_layers=2,
        num_attention_heads=5, head_dim=48, tie_word_embeddings=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Products of more inputs than a core's first cache holds panels of: 608 and 1,220."""
    return _llama(
        tmp_path_factory.mktemp("deep"), tiny_model, 4, hidden_size=608, intermediate_size=1220, num_hidden_layers=1,
        num_attention_heads=2, head_dim=32, tie_word_embeddings=True,
    )  # fmt: skip


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("cache", ["float32", "bfloat16"])
def test_they_agree_with_the_definition(library: Path, odd_model: Path, weights: str, cache: str) -> None:
    loaded, _ = opened(odd_model)
    assert agree(logits(decoder_of(loaded, weights, cache=cache, library=library)), reference_logits(loaded), weights)


def test_each_architecture_agrees(library: Path, tiny_model_of_each_architecture: Path) -> None:
    loaded, _ = opened(tiny_model_of_each_architecture)
    expected = reference_logits(loaded)
    assert agree(logits(decoder_of(loaded, "bfloat16", cache="bfloat16", library=library)), expected, "bfloat16")


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize("architecture", sorted(tiny.WITH_EXPERTS))
def test_experts_agree(library: Path, architecture: str, weights: str) -> None:
    loaded, _ = opened(tiny.tiny_model(architecture))
    got = logits(decoder_of(loaded, weights, cache="bfloat16", library=library))
    assert agree(got, reference_logits(loaded), weights, routed=True)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_a_row_is_computed_alike_in_any_company(library: Path, odd_model: Path, weights: str) -> None:
    loaded, _ = opened(odd_model)
    companies = ((1, 1), (1, 2), (2, 3), (1, 5), (2, 9), (2, 40), (3, 60))
    alone, *others = in_companies(loaded, weights, companies, library)
    for other in others:
        np.testing.assert_array_equal(other, alone)


@pytest.mark.parametrize("weights", ["bfloat16", "int4"])
def test_nor_does_it_matter_how_many_inputs_and_rows_there_are(library: Path, deep_model: Path, weights: str) -> None:
    loaded, _ = opened(deep_model)
    assert agree(logits(decoder_of(loaded, weights, library=library)), reference_logits(loaded), weights)
    alone, *others = in_companies(loaded, weights, ((1, 1), (1, 6), (2, 40)), library)
    for other in others:
        np.testing.assert_array_equal(other, alone)


def test_what_is_not_finite_stays_in_its_row(library: Path, odd_model: Path) -> None:
    loaded, _ = opened(odd_model)
    first, *_ = probe(VOCABULARY)
    rows = 2 * first.tokens.size
    for weights in ("bfloat16", "int8"):
        runner = decoder_of(loaded, weights, cache="bfloat16", library=library)
        common = {
            "tokens": np.tile(first.tokens, 2),
            "positions": np.tile(first.positions, 2),
            "sequences": np.asarray([[0, rows // 2, 0, 0], [rows // 2, rows // 2, 0, 1]], np.int32),
            "tables": np.asarray([[0], [1]], np.int32),
            "logit_rows": np.asarray([rows // 2 - 1, rows - 1], np.int32),
            "num_threads": 2,
        }
        expected = runner.decoder.step(**common)
        for poison in (np.nan, np.inf):
            got = runner.decoder.step(
                **common,
                override_rows=np.asarray([0], np.int32),
                overrides=np.full((1, loaded.text_config.hidden_size), poison, np.float32),
            )
            assert np.isnan(got[0]).all()
            np.testing.assert_array_equal(got[1], expected[1])
