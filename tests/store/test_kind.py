"""What a model's files are for decides which engine runs it, and what memory it is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostler.config import ModelConfig
from hostler.errors import ModelLoadFailed, UnsupportedParameter
from hostler.lifecycle.v1 import lifecycle_pb2

from orchestrator import models
from orchestrator.store import kind_of
from orchestrator.store_client import StoreClient
from tests.models.tiny_encoders import tiny_bert, tiny_cross_encoder
from tests.models.tiny_whisper import tiny_whisper


def directory(path: Path, *others: str, **config: Any) -> Path:
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in others:
        (path / name).write_text("[]", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("architecture", "others", "kind"),
    [
        ("LlamaForCausalLM", (), "text"),
        ("LlavaForConditionalGeneration", (), "text"),
        ("BertModel", (), "embedding"),
        ("XLMRobertaModel", ("modules.json",), "embedding"),
        ("BertForMaskedLM", (), "embedding"),
        ("Qwen3ForCausalLM", ("modules.json",), "embedding"),
        ("T5ForConditionalGeneration", ("modules.json",), "embedding"),
        ("BertModel", ("config_sentence_transformers.json",), "embedding"),
        ("", (), "text"),
    ],
)
def test_files_tell_what_a_model_is_for(tmp_path: Path, architecture: str, others: tuple[str, ...], kind: str) -> None:
    assert kind_of(directory(tmp_path, *others, architectures=[architecture])) == kind


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"id2label": {"0": "LABEL_0"}}, "rerank"),
        ({"num_labels": 1}, "rerank"),
        ({"id2label": {"0": "no", "1": "yes"}}, "text"),
        ({}, "text"),
    ],
)
def test_a_classifier_ranks_only_with_one_label(tmp_path: Path, config: dict[str, Any], kind: str) -> None:
    path = directory(tmp_path, "config_sentence_transformers.json", architectures=["BertForSequenceClassification"])
    directory(path, architectures=["BertForSequenceClassification"], **config)
    assert kind_of(path) == kind


def test_a_directory_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed):
        kind_of(tmp_path)


async def test_auto_becomes_the_engine_that_the_files_are_for(tiny_model: Path, tmp_path: Path) -> None:
    client = StoreClient(tmp_path / "store")
    bert, cross = tiny_bert(tmp_path / "bert"), tiny_cross_encoder(tmp_path / "cross")
    for path, engine in (
        (tiny_model, lifecycle_pb2.ENGINE_KIND_TEXT),
        (bert, lifecycle_pb2.ENGINE_KIND_EMBEDDING),
        (cross, lifecycle_pb2.ENGINE_KIND_RERANK),
    ):
        spec = models.from_config(ModelConfig(name="m", source=str(path)))
        located = await client.locate(spec)
        assert located is not None
        request = models.load_request(spec, located, devices=["cpu"], environment={}, kv_cache_bytes=0)
        assert request.engine == engine
        writes = engine == lifecycle_pb2.ENGINE_KIND_TEXT
        assert (located.footprint.kv_bytes_per_token > 0) is writes
        assert located.footprint.weight_bytes > 0


async def test_a_named_engine_is_taken_at_its_word(tiny_model: Path, tmp_path: Path) -> None:
    spec = models.from_config(ModelConfig(name="m", source=str(tiny_model), engine="embedding"))
    located = await StoreClient(tmp_path / "store").locate(spec)
    assert located is not None
    assert located.footprint.kv_bytes_per_token == 0
    request = models.load_request(spec, located, devices=["cpu"], environment={}, kv_cache_bytes=0)
    assert request.engine == lifecycle_pb2.ENGINE_KIND_EMBEDDING


@pytest.mark.parametrize(
    ("make", "option", "value"),
    [
        (lambda path: tiny_bert(path), "beams", 5),
        (lambda path: tiny_bert(path), "quantize", "int8"),
        (lambda path: tiny_whisper(path), "quantize", "int8"),
        (lambda path: tiny_whisper(path), "adapters", {"bot": "/no/such/adapter"}),
    ],
)
async def test_an_option_of_another_engine_is_refused_by_name_as_soon_as_the_files_tell(
    tmp_path: Path, make: Callable[[Path], Path], option: str, value: Any
) -> None:
    source = make(tmp_path / "model")
    plain, wrong = (
        models.from_config(ModelConfig(name="m", source=str(source), **options)) for options in ({}, {option: value})
    )
    client = StoreClient(tmp_path / "store")
    assert await client.locate(plain) is not None
    with pytest.raises(UnsupportedParameter, match=rf"^m is run by .*, and {option} is an option of") as refused:
        await client.locate(wrong)
    assert refused.value.param == option


async def test_beams_are_for_what_writes_speech_down(tiny_model: Path, tmp_path: Path) -> None:
    client = StoreClient(tmp_path / "store")
    heard = models.from_config(ModelConfig(name="m", source=str(tiny_whisper(tmp_path / "model")), beams=5))
    assert await client.locate(heard) is not None
    with pytest.raises(UnsupportedParameter, match="text engine, and beams is an option of the transcription engine"):
        await client.locate(models.from_config(ModelConfig(name="m", source=str(tiny_model), beams=5)))


async def test_quantized_weights_are_counted_as_each_kind_of_device_keeps_them(
    tiny_model: Path, tmp_path: Path
) -> None:
    client = StoreClient(tmp_path / "store")
    configs = (ModelConfig(name="m", source=str(tiny_model), quantize=kind) for kind in (None, "int8"))
    specs = [models.from_config(config) for config in configs]
    plain, quantized = [await client.locate(spec) for spec in specs]
    assert plain is not None
    assert quantized is not None
    gpu, cpu = quantized.on("cuda").footprint, quantized.on("cpu").footprint
    assert plain.footprint.weight_bytes > gpu.weight_bytes > cpu.weight_bytes, "a GPU's embeddings stay as they are"
    assert dict(plain.on("cuda").quantized)["int8"] == gpu.weight_bytes
    assert dict(plain.quantized)["int8"] == cpu.weight_bytes
