"""Memory estimates from headers alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hostler.errors import InvalidRequest, ModelLoadFailed

from orchestrator.store import adapter_bytes, footprint
from orchestrator.store.footprint import INDEX, SINGLE, read_header
from tests.models.adapters import write_adapter
from tests.models.tiny_whisper import SIZES, tiny_whisper


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def _edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma3"])
def test_weight_bytes_are_those_of_the_loaded_model(architecture: str, tiny_model_of: Callable[[str], Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    path = tiny_model_of(architecture)
    for dtype in ("float32", "bfloat16", "float16"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        assert footprint(path, dtype).weight_bytes == sum(p.numel() * p.element_size() for p in model.parameters())


def test_beams_take_keys_and_values_of_their_own_and_only_in_models_that_hear(tiny_model: Path, tmp_path: Path) -> None:
    tiny_whisper(tmp_path)
    one, five = (footprint(tmp_path, "float32", generates=False, beams=beams) for beams in (1, 5))
    values = 2 * SIZES["decoder_layers"] * SIZES["d_model"] * SIZES["max_target_positions"]
    logits = 4 * SIZES["vocab_size"]
    assert five.workspace_bytes - one.workspace_bytes == 4 * 8 * 4 * (values + logits)
    assert footprint(tiny_model, "float32", beams=5) == footprint(tiny_model, "float32")


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma3", "qwen3_moe", "mixtral"])
def test_quantized_weights_count_as_the_kernels_pack_them_and_nothing_else_changes(
    architecture: str, kind: str, tiny_model_of: Callable[[str], Path]
) -> None:
    from workers.engine import LoadSpec
    from workers.text.describe import describe
    from workers.text.loader import load
    from workers.text.native import build
    from workers.text.native.decoder import NativeDecoder

    path = tiny_model_of(architecture)
    loaded = load(LoadSpec(model="tiny", path=str(path), dtype="bfloat16"), lambda *_: None)
    description = describe(loaded.decoder, loaded.head, loaded.text_config)
    library = build.build()
    decoder = NativeDecoder(library, description, weights=kind, cache="bfloat16", num_blocks=4, num_threads=1)
    vectors = 2 * sum(p.numel() for p in loaded.model.parameters() if p.dim() == 1)
    plain, quantized = footprint(path, "bfloat16"), footprint(path, "bfloat16", kind)
    assert quantized.weight_bytes == decoder.weight_bytes + vectors
    assert replace(quantized, weight_bytes=plain.weight_bytes) == plain


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen3_moe"])
def test_on_a_gpu_only_linear_layers_are_quantized(
    architecture: str, kind: str, tiny_model_of: Callable[[str], Path]
) -> None:
    from workers.engine import LoadSpec
    from workers.text.linear import quantize
    from workers.text.loader import load

    path = tiny_model_of(architecture)
    loaded = load(LoadSpec(model="tiny", path=str(path), dtype="bfloat16"), lambda *_: None)
    left_bytes = loaded.facts.weight_bytes - quantize(loaded.decoder, kind)
    assert footprint(path, "bfloat16", kind, kind="cuda").weight_bytes == left_bytes


def _of_another_family(copy: Path) -> None:
    _edit_config(copy, model_type="novel")


def test_without_kernels_only_linear_layers_are_quantized(copy: Path) -> None:
    on_gpu = [footprint(copy, "bfloat16", kind, kind="cuda") for kind in ("", "int8", "int4")]
    _of_another_family(copy)
    assert [footprint(copy, "bfloat16", kind) for kind in ("", "int8", "int4")] == on_gpu


def test_experts_stay_in_the_dtype_and_rows_that_int4_groups_do_not_divide_are_int8(copy: Path) -> None:
    import numpy
    from safetensors.numpy import save_file

    _of_another_family(copy)
    tensors = {
        "model.layers.0.mlp.experts.0.up_proj.weight": (8, 64),
        "model.layers.0.mlp.up_proj.weight": (8, 40),
        "model.layers.0.mlp.down_proj.weight": (8, 64),
        "model.layers.0.mlp.down_proj.bias": (8,),
    }
    save_file({name: numpy.zeros(shape, numpy.float32) for name, shape in tensors.items()}, copy / SINGLE)
    int4_bytes = 4 * (8 * 64 + 8) + (8 * 40 + 4 * 8) + 8 * 64 // 2 + 4 * 8 * 64 // 32
    assert footprint(copy, "float32", "int4").weight_bytes == int4_bytes
    assert footprint(copy, "float32", "int8").weight_bytes == 4 * (8 * 64 + 8) + (8 * 40 + 4 * 8) + (8 * 64 + 4 * 8)


def test_an_unknown_quantization_is_refused_by_name(tiny_model: Path) -> None:
    with pytest.raises(InvalidRequest, match="int3"):
        footprint(tiny_model, "auto", "int3")


def test_auto_means_the_dtype_that_the_config_names_else_that_of_the_weights(copy: Path) -> None:
    assert footprint(copy, "auto") == footprint(copy, "float32")
    _edit_config(copy, dtype="bfloat16")
    assert footprint(copy, "auto") == footprint(copy, "bfloat16")
    _edit_config(copy, dtype=None)
    assert footprint(copy, "auto") == footprint(copy, "float32")


def test_kv_bytes_of_a_token_follow_layers_kv_heads_and_head_size(tiny_model: Path) -> None:
    assert footprint(tiny_model, "bfloat16").kv_bytes_per_token == 2 * 2 * 2 * 16 * 2
    assert footprint(tiny_model, "float32").kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert footprint(tiny_model, "float32").max_context_tokens == 4096


def test_a_nested_text_config_is_read(copy: Path) -> None:
    flat = footprint(copy, "bfloat16")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({"model_type": "wrapper", "text_config": config}))
    assert footprint(copy, "bfloat16") == flat


def test_a_tied_projection_that_is_stored_anyway_counts_once(
    tiny_model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_model_of("llama"), tmp_path / "copy"))
    untied = footprint(copy, "float32").weight_bytes
    _edit_config(copy, tie_word_embeddings=True)
    assert footprint(copy, "float32").weight_bytes == untied - 1024 * 64 * 4


def test_a_sharded_model_counts_as_the_whole_one_and_a_lost_shard_is_named(copy: Path) -> None:
    from safetensors.numpy import load_file, save_file

    whole = footprint(copy, "bfloat16")
    tensors = load_file(copy / SINGLE)
    (copy / SINGLE).unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, part in halves.items():
        save_file({name: tensors[name] for name in part}, copy / shard)
    weight_map = {name: shard for shard, part in halves.items() for name in part}
    (copy / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert footprint(copy, "bfloat16") == whole
    (copy / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelLoadFailed, match=r"model-00002-of-00002\.safetensors is missing"):
        footprint(copy, "bfloat16")


@pytest.mark.parametrize("keep", [0, 4, 100, 400_000])
def test_truncated_weights_are_refused_with_their_name(copy: Path, keep: int) -> None:
    (copy / SINGLE).write_bytes((copy / SINGLE).read_bytes()[:keep])
    with pytest.raises(ModelLoadFailed, match=r"model\.safetensors is (damaged or )?cut short"):
        footprint(copy, "float32")


@pytest.mark.parametrize("header", [b"[]", b"not json", b'{"a": 3}', b'{"a": {"dtype": "F32"}}'])
def test_a_nonsense_header_is_refused(copy: Path, header: bytes) -> None:
    (copy / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelLoadFailed, match="damaged"):
        footprint(copy, "float32")


def test_a_header_that_is_nested_too_deep_or_claims_gigabytes_is_refused(copy: Path) -> None:
    for header, claimed in ((b'{"a":' * 200_000, None), (b"{}", 2**62), (b'{"a": {"shape": [1' + b"0" * 9999, None)):
        length = len(header) if claimed is None else claimed
        (copy / SINGLE).write_bytes(length.to_bytes(8, "little") + header)
        with pytest.raises(ModelLoadFailed, match="damaged"):
            footprint(copy, "float32")


def test_a_config_that_is_a_bomb_is_refused_in_words(copy: Path) -> None:
    config = copy / "config.json"
    for text in ('{"a":' * 200_000, "[" * 200_000, '{"hidden_size": ' + "9" * 5000 + "}", "\xff", "[]"):
        config.write_text(text, encoding="latin-1")
        with pytest.raises(ModelLoadFailed, match=r"config\.json is not"):
            footprint(copy, "float32")
    with config.open("wb") as file:
        file.truncate(65 * 10**6)  # Sparse: takes no disk.
    with pytest.raises(ModelLoadFailed, match="larger than"):
        footprint(copy, "float32")


def test_an_index_does_not_lead_out_of_the_model_s_directory(copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((copy / SINGLE).read_bytes())
    names = list(read_header(copy / SINGLE))
    (copy / SINGLE).unlink()
    for shard in (str(outside), "../outside.safetensors", f"../{tmp_path.name}/outside.safetensors"):
        (copy / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
        with pytest.raises(ModelLoadFailed, match=r"^outside\.safetensors is missing"):
            footprint(copy, "float32")


def test_an_unknown_dtype_is_refused_by_name(tiny_model: Path) -> None:
    with pytest.raises(InvalidRequest, match="int3"):
        footprint(tiny_model, "int3")


@pytest.mark.real_model
def test_the_real_default_model_is_estimated_as_it_is(smollm2: Path) -> None:
    estimate = footprint(smollm2, "bfloat16")
    assert estimate.weight_bytes == 134_515_008 * 2
    assert (estimate.kv_bytes_per_token, estimate.max_context_tokens) == (2 * 30 * 3 * 64 * 2, 8192)


def test_an_adapter_counts_its_matrices_in_float32_with_ranks_of_sixteen(tiny_model: Path, tmp_path: Path) -> None:
    directory = write_adapter(tmp_path, tiny_model, seed=0, rank=19, targets=("q_proj", "down_proj"), layers=(1,))
    assert adapter_bytes("a", directory) == 4 * 32 * ((64 + 64) + (128 + 64))


def test_an_adapter_without_its_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match=r"^Adapter bot: adapter_model\.safetensors is missing"):
        adapter_bytes("bot", tmp_path)
