"""Over how many devices a model can be split, held against what the worker and transformers say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.store.footprint import footprint
from orchestrator.store.split import BY_HEADS, GATHERED, Splitting, splitting

QWEN_CODER = {"model_type": "qwen2", "num_attention_heads": 14, "num_key_value_heads": 2, "num_hidden_layers": 24}
SMOLLM = {"model_type": "llama", "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30}
LLAMA_70B = {"model_type": "llama", "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 80}


def of(directory: Path, config: dict[str, Any], kind: Any = "cpu", **options: bool) -> Splitting:
    (directory / "config.json").write_text(json.dumps(config))
    return splitting(directory, kind, **options)


def test_heads_must_divide_where_layers_cannot_be_laid_over_devices(tmp_path: Path) -> None:
    assert of(tmp_path, QWEN_CODER).counts == (2, 14)
    assert of(tmp_path, QWEN_CODER).max_parts == 2
    assert of(tmp_path, SMOLLM).counts == (3, 9)
    assert of(tmp_path, SMOLLM).max_parts == 1
    assert of(tmp_path, LLAMA_70B).counts == (2, 4, 8, 16, 32, 64)


def test_on_gpus_layers_over_devices_fill_the_gaps(tmp_path: Path) -> None:
    assert of(tmp_path, SMOLLM, "cuda").max_parts == 30
    assert of(tmp_path, {"model_type": "unheard-of", "num_hidden_layers": 4}, "cuda").counts == (2, 3, 4)


@pytest.mark.parametrize("extra", [{"vision_config": {}}, {"text_config": {}}])
def test_models_that_take_images_are_not_split(tmp_path: Path, extra: dict[str, Any]) -> None:
    assert of(tmp_path, {**LLAMA_70B, **extra}, "cuda").max_parts == 1


def test_models_with_adapters_are_not_split(tmp_path: Path) -> None:
    assert of(tmp_path, LLAMA_70B, "cuda", has_adapters=True).max_parts == 1


def test_a_part_has_its_share_of_the_weights_and_of_the_keys_and_values(tiny_model: Path) -> None:
    whole = footprint(tiny_model, "float32")
    split = splitting(tiny_model, "cpu")
    assert split.counts == (2, 4)
    two, four = split.part(whole, 2), split.part(whole, 4)
    assert (two.weight_bytes, two.kv_bytes_per_token) == (whole.weight_bytes // 2, whole.kv_bytes_per_token // 2)
    # Four parts share two key heads: each head is kept twice.
    assert (four.weight_bytes, four.kv_bytes_per_token) == (whole.weight_bytes // 4, whole.kv_bytes_per_token // 2)
    assert split.part(whole, 1) is whole


def test_every_listed_family_is_cut_by_transformers_as_the_list_says() -> None:
    from transformers import CONFIG_MAPPING

    from workers.text.parallel.plan import Attention, plan_split

    for family in BY_HEADS | GATHERED:
        plan = plan_split(CONFIG_MAPPING[family].base_model_tp_plan, num_heads=8, num_kv_heads=4, num_parts=2)
        assert plan.overrides == {}, family
        assert plan.attention is (Attention.HEADS if family in BY_HEADS else Attention.WHOLE), family
        assert plan.num_kv_heads == (2 if family in BY_HEADS else 4), family


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 4), (8, 2), (9, 3), (8, 1), (12, 4)])
def test_keys_and_values_are_kept_as_often_as_the_worker_keeps_them(tmp_path: Path, heads: int, kv_heads: int) -> None:
    from transformers import LlamaConfig

    from workers.text.parallel.plan import Attention, plan_split

    config = {"model_type": "llama", "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    split = of(tmp_path, config)
    for parts in range(2, 17):
        plan = plan_split(LlamaConfig.base_model_tp_plan, heads, kv_heads, parts)
        assert (parts in split.counts) == (plan.attention is not Attention.WHOLE)
        if parts in split.counts:
            assert split.kv_copies[split.counts.index(parts)] * kv_heads == plan.num_kv_heads * parts
