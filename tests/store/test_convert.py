"""GGUF in, Hugging Face directory out: the same model, bit for bit as far as bf16 goes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.store.gguf_writer import write_gguf
from workers.convert import convert, to_bfloat16
from workers.convert_config import UnsupportedGguf, config_json
from workers.convert_tokenizer import byte_level_tokenizer

QUESTION = [{"role": "user", "content": "Tell me: how many is 12 + 30, naïve 世界?"}]


def _load(path: Path, **changes: Any) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **changes)
    return model, AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
def test_a_converted_model_gives_the_logits_of_the_original(
    architecture: str, tiny_model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """llama, qwen2, qwen3 by our own table; gemma3 through transformers; mistral travels as llama in GGUF files."""
    import torch

    original = tiny_model_of(architecture)
    convert(write_gguf(original, tmp_path / "m.gguf"), tmp_path / "out", lambda _done, _total: None)
    model, tokenizer = _load(tmp_path / "out")
    # GGUF files carry neither which layers slide nor the query scale: those of the published Gemma 3 sizes are meant.
    gemma = {"layer_types": ["sliding_attention"] * 2, "query_pre_attn_scalar": 256}
    changes = gemma if architecture == "gemma3" else {}
    expected, expected_tokenizer = _load(original, **changes)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
        # Shorter than the sliding windows: a llama GGUF does not carry one.
        ids = torch.arange(100, 124).unsqueeze(0)
        assert torch.allclose(model(ids).logits, expected(ids).logits, atol=0.02)
    assert tokenizer.apply_chat_template(QUESTION, tokenize=False) == expected_tokenizer.apply_chat_template(
        QUESTION, tokenize=False
    )
    text = expected_tokenizer.apply_chat_template(QUESTION, tokenize=False)
    assert tokenizer(text).input_ids == expected_tokenizer(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert 2 in model.generation_config.eos_token_id


def test_tied_embeddings_stay_tied_and_are_stored_once(tiny_model: Path, tmp_path: Path) -> None:
    convert(write_gguf(tiny_model, tmp_path / "m.gguf"), tmp_path / "out", lambda _done, _total: None)
    model, _ = _load(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 2.1 * sum(p.numel() for p in model.parameters())


def test_an_output_that_is_the_embedding_again_is_tied_and_another_one_is_not(
    tiny_model: Path, tiny_model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Qwen's own files carry both; taken as they are, 494 million parameters become 630 million."""
    from safetensors.numpy import load_file

    embedding = load_file(tiny_model / "model.safetensors")["model.embed_tokens.weight"]
    coarse = np.round(embedding * 8).astype(np.float32) / 8
    source = write_gguf(tiny_model, tmp_path / "m.gguf", extra={"output.weight": coarse})
    convert(source, tmp_path / "tied", lambda _done, _total: None)
    assert json.loads((tmp_path / "tied" / "config.json").read_text())["tie_word_embeddings"]
    convert(write_gguf(tiny_model_of("llama"), tmp_path / "u.gguf"), tmp_path / "untied", lambda _done, _total: None)
    assert not json.loads((tmp_path / "untied" / "config.json").read_text())["tie_word_embeddings"]


def test_bfloat16_rounds_to_nearest_even_like_torch() -> None:
    import torch

    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    values[:4] = [0.0, -0.0, 1.00390625, 1.01171875]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(to_bfloat16(values), expected)


def test_llama_3_rope_factors_become_its_rope_parameters() -> None:
    fields = {
        "general.architecture": "llama",
        "llama.attention.head_count": 2,
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 64,
        "llama.block_count": 1,
        "llama.context_length": 131072,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 500000.0,
    }
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](
        LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=given), None
    )
    plain = [500000.0 ** (-2 * index / 128) for index in range(64)]
    factors = [a / float(b) for a, b in zip(plain, scaled, strict=True)]
    assert config_json(fields, {"model.embed_tokens.weight": (8, 256)}, factors)["rope_parameters"] == given
    with pytest.raises(UnsupportedGguf, match="rope factors"):
        config_json(fields, {"model.embed_tokens.weight": (8, 256)}, [2.0] * 64)


def test_tool_call_tags_are_text_that_clients_see_even_where_the_file_calls_them_control() -> None:
    tokens = ["<|im_end|>", "<tool_call>", "a"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 1],
        "tokenizer.ggml.merges": [],
    }
    tokenizer = byte_level_tokenizer(fields)
    assert tokenizer is not None
    assert tokenizer.decode([0, 1, 2], skip_special_tokens=True) == "<tool_call>a"


def _run(source: Path, destination: Path) -> tuple[int, list[dict[str, Any]]]:
    command = [sys.executable, "-m", "workers.convert", str(source), str(destination), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_the_command_line_speaks_json_lines_to_its_end(tiny_model: Path, tmp_path: Path) -> None:
    status, events = _run(write_gguf(tiny_model, tmp_path / "m.gguf"), tmp_path / "out")
    assert status == 0
    assert {event["stage"] for event in events[:-1]} == {"convert"}
    assert events[-2]["done_bytes"] == events[-2]["total_bytes"] > 0
    assert events[-1] == {"stage": "done", "path": str(tmp_path / "out"), "name": "m"}


@pytest.mark.parametrize("keep", [3, 40, 5_000, 500_000])
def test_a_gguf_that_is_cut_short_is_an_error_in_words(tiny_model: Path, tmp_path: Path, keep: int) -> None:
    whole = write_gguf(tiny_model, tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:keep])
    status, events = _run(tmp_path / "cut.gguf", tmp_path / "out")
    assert (status, events[-1]["stage"]) == (1, "error")
    assert events[-1]["message"].startswith("cut.gguf could not be converted")


def test_the_converter_needs_no_torch_for_the_architectures_in_its_table(tiny_model: Path, tmp_path: Path) -> None:
    write_gguf(tiny_model, tmp_path / "m.gguf")
    code = (
        "import sys; from pathlib import Path; from workers.convert import convert;"
        f"convert(Path({str(tmp_path / 'm.gguf')!r}), Path({str(tmp_path / 'out')!r}), print);"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)


@pytest.mark.real_model
def test_the_real_default_model_says_paris_and_stops(smollm2: Path) -> None:
    model, tokenizer = _load(smollm2)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = tokenizer.decode(inputs["input_ids"][0])
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face")
    reply = model.generate(**inputs, do_sample=False, max_new_tokens=30)[0][inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(reply) == "The capital of France is Paris.<|im_end|>"
    eos = model.generation_config.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in eos
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
