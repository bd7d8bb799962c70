"""LoRA adapters in the text engine: against transformers' models with merged weights, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostler.errors import ModelLoadFailed, ModelNotFound
from hostler.inference.v1 import inference_pb2 as pb
from safetensors.torch import load_file, save_file

from tests.models.adapters import ATTENTION, merged, write_adapter
from tests.workers.test_native import VOCABULARY, decoder_of, opened
from tests.workers.test_text_engine import collect, random_prompts
from workers import translate
from workers.engine import AdapterSource, GenerationRequest, LoadSpec, ModelFacts, SamplingParams, TokenPrompt
from workers.text.adapters import linear_layers, read_adapter
from workers.text.describe import describe, described_layers
from workers.text.directory import read_directory
from workers.text.eager import open_eager
from workers.text.engine import TextEngine
from workers.text.loader import load
from workers.text.native import build
from workers.text.native.runner import probe
from workers.text.opening import open_native, open_recipe, open_text_engine

MAX_TOKENS = 16
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture
def two_adapters(tmp_path: Path) -> Callable[[Path], tuple[AdapterSource, ...]]:
    """Write two adapters of a model: one on every linear layer, one of an odd rank on few and with another scale."""

    def written(base: Path) -> tuple[AdapterSource, ...]:
        everywhere = write_adapter(tmp_path / "everywhere", base, seed=1)
        some = write_adapter(
            tmp_path / "some", base, seed=2, rank=19, alpha=3, targets=("q_proj", "v_proj", "up_proj"), layers=(1,),
            use_rslora=True,
        )  # fmt: skip
        return AdapterSource("everywhere", str(everywhere)), AdapterSource("some", str(some))

    return written


def request(prompt: tuple[int, ...], adapter: str = "", **fields: Any) -> GenerationRequest:
    wanted = {"sampling": GREEDY, "max_tokens": MAX_TOKENS, "top_logprobs": 0, **fields}
    return GenerationRequest(TokenPrompt(prompt), adapter=adapter, **wanted)


async def reply_ids(engine: Any, prompt: tuple[int, ...], adapter: str = "") -> list[int]:
    _, finish, deltas = await collect(engine, request(prompt, adapter))
    ids = [p.token_id for d in deltas for p in d.logprobs]
    assert len(ids) == finish.num_completion_tokens
    return ids


def expected_ids(model: Any, prompt: tuple[int, ...]) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False)
    return [int(i) for i in out[0, len(prompt) :]]


async def test_greedy_replies_equal_those_of_merged_models_in_one_batch_with_the_base_and_each_other(
    tiny_model_of_each_architecture: Path, open_engine: Callable[..., Any], two_adapters: Callable[..., Any]
) -> None:
    from transformers import AutoModelForCausalLM

    base, adapters = tiny_model_of_each_architecture, two_adapters(tiny_model_of_each_architecture)
    models = {"": AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()}
    models |= {source.name: merged(base, Path(source.path)) for source in adapters}
    asked = [(prompt, name) for prompt in random_prompts(5, 900, 50) for name in models]
    expected = [expected_ids(models[name], prompt) for prompt, name in asked]
    assert len({tuple(ids) for ids in expected}) > 10, "adapters that change nothing would prove nothing"
    async with open_engine(base, adapters=adapters, max_running=6, prefill_chunk_tokens=16) as engine:
        assert engine.facts.adapters == ("everywhere", "some")
        alone = [await reply_ids(engine, *each) for each in asked[:3]]
        assert alone == expected[:3]
        assert await asyncio.gather(*(reply_ids(engine, *each) for each in asked)) == expected


async def test_base_and_adapters_never_share_cached_prompts_but_each_shares_with_itself(
    tiny_model: Path, open_engine: Callable[..., Any], two_adapters: Callable[..., Any]
) -> None:
    prompt = tuple(range(100, 160))
    async with open_engine(tiny_model, adapters=two_adapters(tiny_model)) as engine:

        async def num_cached(adapter: str) -> int:
            _, finish, _ = await collect(engine, request(prompt, adapter))
            return int(finish.num_cached_tokens)

        assert [await num_cached(name) for name in ("", "everywhere", "some")] == [0, 0, 0]
        assert [await num_cached(name) >= 48 for name in ("some", "", "everywhere")] == [True] * 3


async def test_adapters_outlive_the_change_to_the_kernels(tiny_model: Path, two_adapters: Callable[..., Any]) -> None:
    adapters = two_adapters(tiny_model)
    spec = LoadSpec(model="tiny", path=str(tiny_model), dtype="float32", num_threads=1, adapters=adapters)
    directory = read_directory(spec)
    loaded = load(spec, lambda *_: None, directory)
    engine = TextEngine(loaded, spec, open_eager(loaded, spec, keep_weights=True))
    names = ("", "everywhere", "some")
    try:
        before = [await reply_ids(engine, (5, 6, 7), name) for name in names]
        await engine.adopt(await asyncio.to_thread(open_native, directory, loaded, spec, build.build()))
        loaded.free_weights()
        assert [await reply_ids(engine, (5, 6, 7), name) for name in names] == before
        assert engine.runner == "native"
        assert all(delta.down.numel() == 0 for adapter in loaded.adapters for delta in adapter.deltas.values())
    finally:
        await engine.close()


async def test_a_model_that_goes_straight_from_its_files_to_the_kernels_brings_its_adapters(
    tiny_model: Path, two_adapters: Callable[..., Any]
) -> None:
    build.build()
    adapters = two_adapters(tiny_model)
    spec = LoadSpec(model="tiny", path=str(tiny_model), dtype="float32", num_threads=1, adapters=adapters)
    expected = {source.name: expected_ids(merged(tiny_model, Path(source.path)), (5, 6, 7)) for source in adapters}
    for _ in range(2):  # Whatever was proved before, the second load has a recipe.
        directory = read_directory(spec)
        ready = open_recipe(directory, spec, build.build(), lambda *_: None)
        engine = await open_text_engine(spec, lambda *_: None)
        try:
            assert {name: await reply_ids(engine, (5, 6, 7), name) for name in expected} == expected
        finally:
            await engine.close()
    assert ready is not None
    ready[1].close()


@pytest.mark.parametrize("case", ["another kind", "another shape", "a layer too many", "an embedding"])
def test_what_is_refused_is_refused_on_the_short_way_too(tiny_model: Path, tmp_path: Path, case: str) -> None:
    damage, told = DAMAGES[case]
    directory = write_adapter(tmp_path / "adapter", tiny_model, seed=1, targets=ATTENTION)
    loaded = load(LoadSpec(model="tiny", path=str(tiny_model), dtype="float32"), lambda *_: None)
    layers = described_layers(describe(loaded.decoder, loaded.head, loaded.text_config))
    assert layers == linear_layers(loaded.model)
    damage(directory)
    with pytest.raises(ModelLoadFailed, match=told):
        read_adapter("fine", directory, layers)


@pytest.mark.parametrize("fields", [{"quantize": "int8"}, {"quantize": "int4"}, {"dtype": "bfloat16"}])
async def test_adapters_are_served_beside_narrow_weights(
    tiny_model: Path, runner_name: str, fields: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if runner_name == "eager":
        monkeypatch.setenv("HOSTLER_KERNELS_DIR", str(tmp_path / "none"))
        monkeypatch.setenv("CXX", "/nowhere/c++")
    else:
        build.build()
    adapters = (
        AdapterSource("changes", str(write_adapter(tmp_path / "changes", tiny_model, seed=1))),
        AdapterSource("nothing", str(write_adapter(tmp_path / "nothing", tiny_model, seed=2, alpha=0))),
    )
    options: dict[str, Any] = {"dtype": "float32", "num_threads": 1, **fields}
    spec = LoadSpec(model="tiny", path=str(tiny_model), adapters=adapters, **options)
    engine = await open_text_engine(spec, lambda *_: None)
    try:
        assert engine.runner == runner_name
        base, nothing, changed = [await reply_ids(engine, (5, 6, 7), name) for name in ("", "nothing", "changes")]
        assert nothing == base
        assert changed != base
    finally:
        await engine.close()


def test_an_adapted_row_is_computed_alike_in_any_company_and_by_any_number_of_threads(
    tiny_model: Path, two_adapters: Callable[..., Any]
) -> None:
    loaded, _ = opened(tiny_model, adapters=two_adapters(tiny_model))
    first, *_ = probe(VOCABULARY)
    rows = first.tokens.size

    def last_row(company: list[int], num_threads: int) -> np.ndarray[Any, Any]:
        decoder = decoder_of(loaded, "bfloat16", cache="bfloat16", num_threads=num_threads).decoder
        for index, adapter in enumerate(loaded.adapters):
            decoder.add_adapter(index, adapter)
        adapters = np.asarray([*company, 0], np.int32)
        works = adapters.size
        return decoder.step(
            tokens=np.tile(first.tokens, works),
            positions=np.tile(first.positions, works),
            sequences=np.asarray([[rows * i, rows, 0, i] for i in range(works)], np.int32),
            tables=np.arange(works, dtype=np.int32)[:, None],
            logit_rows=np.asarray([rows * works - 1], np.int32),
            num_threads=num_threads,
            adapters=adapters,
        )

    expected = last_row([], 1)
    for company, num_threads in (([], 2), ([0], 1), ([1, 0, -1], 3), ([0, -1, 1, 0], 2)):
        np.testing.assert_array_equal(last_row(company, num_threads), expected)


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


A_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another kind": (lambda d: edit_config(d, peft_type="IA3"), "IA3"),
    "biases": (lambda d: edit_config(d, bias="all"), "biases"),
    "whole modules": (lambda d: edit_config(d, modules_to_save=["lm_head"]), "modules_to_save"),
    "DoRA": (lambda d: edit_config(d, use_dora=True), "use_dora"),
    "ranks by layer": (lambda d: edit_config(d, rank_pattern={"q_proj": 2}), "rank_pattern"),
    "what a later peft may bring": (lambda d: edit_config(d, use_novelty={"x": 1}), "use_novelty"),
    "a changed base": (lambda d: edit_config(d, init_lora_weights="pissa"), "pissa"),
    "a rank beyond bounds": (lambda d: edit_config(d, r=100_000), "100000"),
    "a rank that is no number": (lambda d: edit_config(d, r=True), "True"),
    "no alpha": (lambda d: edit_config(d, lora_alpha=None), "lora_alpha"),
    "another rank than the weights'": (lambda d: edit_config(d, r=8), r"needs \(8, 64\)"),
    "no configuration": (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json cannot be read"),
    "no JSON": (lambda d: (d / "adapter_config.json").write_text("{"), "not valid JSON"),
    "no object": (lambda d: (d / "adapter_config.json").write_text("[]"), "not a JSON object"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors cannot be read"),
    "cut short": (lambda d: (d / "adapter_model.safetensors").write_bytes(b"\0" * 9), "damaged"),
    "half a pair": (lambda d: edit_weights(d, lambda t: t.pop(A_KEY)), "lora_A of .* is missing"),
    "another shape": (lambda d: edit_weights(d, lambda t: t.update({A_KEY: torch.zeros(4, 8)})), r"\(4, 64\)"),
    "integers": (lambda d: edit_weights(d, lambda t: t.update({A_KEY: torch.zeros(4, 64).int()})), "int32"),
    "a layer too many": (
        lambda d: edit_weights(d, lambda t: t.update({A_KEY.replace("layers.0", "layers.7"): torch.zeros(4, 64)})),
        "layers.7",
    ),
    "an embedding": (
        lambda d: edit_weights(d, lambda t: t.update({"model.embed_tokens.lora_embedding_A": torch.zeros(4, 9)})),
        "lora_embedding_A",
    ),
    "nothing": (lambda d: edit_weights(d, lambda t: t.clear()), "empty"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_what_is_not_plain_lora_for_this_model_is_refused_by_name(tiny_model: Path, tmp_path: Path, case: str) -> None:
    damage, told = DAMAGES[case]
    directory = write_adapter(tmp_path / "adapter", tiny_model, seed=1, targets=ATTENTION)
    damage(directory)
    spec = LoadSpec(
        model="tiny", path=str(tiny_model), dtype="float32", adapters=(AdapterSource("fine", str(directory)),)
    )
    with pytest.raises(ModelLoadFailed, match=f"^Adapter fine: .*{told}.*[.]$") as caught:
        load(spec, lambda *_: None)
    assert str(tmp_path) not in caught.value.message


def test_a_request_for_an_adapter_that_is_not_here_is_not_answered_by_the_base() -> None:
    facts = ModelFacts("m", "text", "A", "float32", max_context_tokens=64, adapters=("a",))
    assert translate.generation_request(pb.GenerateRequest(text="hi", adapter="a"), facts, "r").adapter == "a"
    with pytest.raises(ModelNotFound, match="'b'"):
        translate.generation_request(pb.GenerateRequest(text="hi", adapter="b"), facts, "r")


async def test_what_peft_saves_is_read_as_peft_means_it(
    tiny_model: Path, tmp_path: Path, open_engine: Callable[..., Any]
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    config = peft.LoraConfig(
        r=6, lora_alpha=9, use_rslora=True, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    torch.manual_seed(3)
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "saved")
    prompts = random_prompts(4, 900, 40)
    expected = [expected_ids(model, prompt) for prompt in prompts]
    async with open_engine(tiny_model, adapters=(AdapterSource("saved", str(tmp_path / "saved")),)) as engine:
        assert await asyncio.gather(*(reply_ids(engine, prompt, "saved") for prompt in prompts)) == expected
        assert [await reply_ids(engine, prompt) for prompt in prompts] != expected
