"""The kernels are proved on a model's first layers, one of every kind; the recipe has all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.tiny import SIZES
from tests.workers.decoders import decoder_of, logits, opened, reference_logits
from workers.engine import LoadSpec
from workers.text import loader, proving
from workers.text.describe import first_of_each_kind
from workers.text.directory import Directory, read_directory
from workers.text.native import build
from workers.text.native.runner import agree
from workers.text.opening import open_native, open_recipe, recipe_of


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 5}, attention_bias=True))


def _smollm3() -> Any:
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    return SmolLM3ForCausalLM(SmolLM3Config(**{**SIZES, "num_hidden_layers": 9}))


def _gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(**{**SIZES, "num_hidden_layers": 8}, sliding_window=32, query_pre_attn_scalar=16)
    return Gemma3ForCausalLM(config)


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0, 5]}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SIZES, "num_hidden_layers": 6}, **experts))


DEEP: dict[str, tuple[Callable[[], Any], int]] = {
    "llama": (_llama, 2),
    "smollm3": (_smollm3, 4),  # every fourth layer leaves positions as they are
    "gemma3": (_gemma3, 6),  # every sixth sees everything
    "qwen3_moe": (_qwen3_moe, 2),  # the first has no experts
}


@pytest.fixture
def model_of(tmp_path: Path, tiny_model: Path) -> Callable[[str], Path]:
    def build_one(name: str) -> Path:
        from transformers import AutoTokenizer

        torch.manual_seed(0)
        model = DEEP[name][0]().to(torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.15)
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / name)
        return tmp_path / name

    return build_one


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernels in a directory of the test's own: recipes lie beside them."""
    built = build.build()
    monkeypatch.setenv("HOSTLER_KERNELS_DIR", str(tmp_path / "kernels"))
    (tmp_path / "kernels").mkdir()
    own = tmp_path / "kernels" / built.name
    own.symlink_to(built)
    return own


def _spec(path: Path, quantize: str = "") -> LoadSpec:
    return LoadSpec(model="deep", path=str(path), dtype="float32", num_threads=2, quantize=quantize)


@pytest.mark.parametrize("quantize", ["", "int8"])
@pytest.mark.parametrize("name", DEEP)
def test_the_first_of_each_kind_are_loaded_and_all_are_served(
    name: str, quantize: str, model_of: Callable[[str], Path], library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = model_of(name), []

    def load(spec: LoadSpec, report: Any, directory: Directory) -> Any:
        loaded = real(spec, report, directory)
        seen.append(len(loaded.decoder.layers))
        return loaded

    real = loader.load
    monkeypatch.setattr(loader, "load", load)
    spec = _spec(path, quantize)
    directory = read_directory(spec)
    assert proving.prove(spec)
    assert seen == [DEEP[name][1]] == [first_of_each_kind(directory.text)]
    monkeypatch.setattr(loader, "load", real)
    found = open_recipe(directory, spec, library, lambda *_: None)
    assert found is not None
    loaded, runner = found
    whole, _ = opened(path)
    assert loaded.facts.num_parameters == whole.facts.num_parameters
    assert loaded.facts.architecture == whole.facts.architecture
    weights = quantize or "float32"
    got, module = logits(runner), decoder_of(whole, weights)
    torch.testing.assert_close(got, logits(module), atol=0, rtol=0)
    assert agree(got, reference_logits(whole), weights, routed=name == "qwen3_moe")


@pytest.mark.parametrize("change", ["another type", "another shape", "missing"])
def test_a_later_layer_unlike_the_proved_one_has_no_recipe(
    change: str, model_of: Callable[[str], Path], library: Path
) -> None:
    path = model_of("llama")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.4.mlp.up_proj.weight"
    if change == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name].half() if change == "another type" else tensors[name][:-16].contiguous()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    spec = _spec(path)
    assert not proving.prove(spec)
    assert not recipe_of(library, read_directory(spec), spec).exists()


def test_a_layer_that_computes_otherwise_is_noticed(
    model_of: Callable[[str], Path], library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer in four leaves positions as they are: kernels that rotated them in every layer would be refused."""
    monkeypatch.setattr("workers.text.describe._rope_of", lambda _attention, rope: rope)
    assert not proving.prove(_spec(model_of("smollm3")))


def test_a_proof_leaves_the_module_as_it_is(model_of: Callable[[str], Path], library: Path) -> None:
    """An engine may be serving through it: kernels are compiled, and proved, beside it."""
    path = model_of("gemma3")
    spec = _spec(path)
    loaded = loader.load(spec, lambda *_: None)
    seen: list[int] = []
    loaded.decoder.register_forward_pre_hook(lambda *_: seen.append(len(loaded.decoder.layers)))
    before = reference_logits(loaded)
    open_native(read_directory(spec), loaded, spec, library).close()
    assert set(seen) == {8}
    assert len(seen) == 6, "the probe's three steps, here and in the proof"
    torch.testing.assert_close(reference_logits(loaded), before, atol=0, rtol=0)
