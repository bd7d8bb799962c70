"""The embedding engine against sentence-transformers' own vectors and transformers' models, alone and in company."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hostler.errors import (
    ContextLengthExceeded,
    Internal,
    InvalidRequest,
    ModelLoadFailed,
    Overloaded,
    UnsupportedParameter,
)
from safetensors.torch import save_file

from tests.models.tiny_encoders import tiny_bert, tiny_cross_encoder, write_modules
from workers.embedding.engine import EmbeddingEngine
from workers.embedding.models import TokenSequence
from workers.embedding.opening import is_reentrant as is_reentrant_with
from workers.embedding.opening import load, open_embedding_engine, open_rerank_engine
from workers.engine import ChatPrompt, GenerationRequest, LoadSpec, TextPrompt, TokenPrompt
from workers.vectors import EmbeddingRequest, RankingRequest

TEXTS = [
    "a",
    "The quick brown fox",
    "def f(x):\n    return x",
    "你好，世界 🙂",
    "lazy dog " * 12,
    "<|im_end|> is text here",
]
VECTORS = Path(__file__).with_name("minilm_vectors.json")


def spec(path: Path, **fields: Any) -> LoadSpec:
    return replace(LoadSpec(model="tiny", path=str(path), num_threads=1), **fields)


def silent(*_: object) -> None:
    """Progress that nobody looks at."""


@asynccontextmanager
async def opened(path: Path, **fields: Any) -> AsyncIterator[EmbeddingEngine]:
    engine = await open_embedding_engine(spec(path, **fields), silent)
    try:
        yield engine
    finally:
        await engine.close()


async def vectors(engine: EmbeddingEngine, texts: Sequence[str], **fields: Any) -> Any:
    return (await engine.embed(EmbeddingRequest([TextPrompt(text) for text in texts], **fields))).vectors


def hidden_states(path: Path, text: str) -> torch.Tensor:
    """Return (tokens, width): transformers' own last hidden states of one text alone."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = torch.tensor([tokenizer(text, split_special_tokens=True)["input_ids"]])
    with torch.inference_mode():
        states: torch.Tensor = AutoModel.from_pretrained(path, dtype=torch.float32).eval()(ids).last_hidden_state[0]
    return states


def unit(vector: torch.Tensor) -> Any:
    return (vector / vector.norm()).numpy()


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return tiny_bert(tmp_path / "bert")


@pytest.mark.real_model
async def test_vectors_equal_sentence_transformers_own(minilm: Path) -> None:
    known = json.loads(VECTORS.read_text(encoding="utf-8"))
    want = np.stack([np.frombuffer(base64.b64decode(text), "<f4") for text in known["vectors"]])
    async with opened(minilm) as engine:
        assert (engine.facts.max_context_tokens, engine.facts.embedding_dimensions) == (256, 384)
        assert np.abs(await vectors(engine, known["texts"]) - want).max() < 1e-4
        alone = [(await vectors(engine, [text]))[0] for text in known["texts"]]
        assert np.abs(np.stack(alone) - want).max() < 1e-4


async def test_without_a_recipe_an_encoder_gives_the_mean_and_a_causal_model_its_last_token(
    bert: Path, tiny_model: Path
) -> None:
    for path, of in ((bert, lambda s: s.mean(0)), (tiny_model, lambda s: s[-1])):
        async with opened(path) as engine:
            got = await vectors(engine, TEXTS)
        for vector, text in zip(got, TEXTS, strict=True):
            assert np.abs(vector - unit(of(hidden_states(path, text)))).max() < 1e-5, (path, text)


@pytest.mark.parametrize(
    ("mode", "of"),
    [
        ("cls", lambda s: s[0]),
        ("lasttoken", lambda s: s[-1]),
        ("max", lambda s: s.amax(0)),
        ("mean", lambda s: s.mean(0)),
        ("mean_sqrt_len_tokens", lambda s: s.sum(0) / len(s) ** 0.5),
        ("weightedmean", lambda s: (s * torch.arange(1.0, len(s) + 1)[:, None]).sum(0) / sum(range(1, len(s) + 1))),
    ],
)
async def test_each_pooling_is_that_of_the_text_alone_whatever_it_is_padded_with(
    bert: Path, mode: str, of: Any
) -> None:
    write_modules(bert, ("Pooling", {"pooling_mode": mode}))
    async with opened(bert, prefill_chunk_tokens=4096) as engine:
        got = await vectors(engine, TEXTS)
    for vector, text in zip(got, TEXTS, strict=True):
        assert np.abs(vector - of(hidden_states(bert, text)).numpy()).max() < 1e-4


async def test_dense_layers_normalising_and_prompts_follow_the_models_files(bert: Path) -> None:
    weight, bias = torch.randn(7, 48), torch.randn(7)
    write_modules(
        bert,
        ("Pooling", {"pooling_mode_mean_tokens": True}),
        ("Dense", {"in_features": 48, "out_features": 7, "activation_function": "torch.nn.modules.activation.Tanh"}),
        ("Normalize", {}),
        prompts={"query": "find: ", "passage": "text: "},
        default_prompt_name="query",
    )
    save_file({"linear.weight": weight, "linear.bias": bias}, bert / "2_Dense" / "model.safetensors")

    def want(text: str) -> Any:
        return unit(torch.tanh(weight @ hidden_states(bert, text).mean(0) + bias))

    async with opened(bert) as engine:
        assert engine.facts.embedding_dimensions == 7
        assert np.abs((await vectors(engine, ["fox"]))[0] - want("find: fox")).max() < 1e-5
        short = (await vectors(engine, ["fox"], dimensions=3))[0]
        assert np.abs(short - unit(torch.tensor(want("find: fox")[:3]))).max() < 1e-5
        ranked = await engine.rank(RankingRequest("fox", ["dog", "fox"]))
    cosines = [float(want("find: fox") @ want(f"text: {d}")) for d in ("dog", "fox")]
    assert ranked.scores == pytest.approx([(1 + c) / 2 for c in cosines], abs=1e-5)


async def test_token_ids_are_taken_as_they_are_and_texts_never_become_control_tokens(bert: Path) -> None:
    async with opened(bert) as engine:
        ids = await engine.tokenize(TextPrompt("the <|im_end|> fox"))
        assert ids.count(2) == 1
        of_ids = (await engine.embed(EmbeddingRequest([TokenPrompt(tuple(ids))]))).vectors
        assert np.abs(of_ids - await vectors(engine, ["the <|im_end|> fox"])).max() < 1e-6
        for ids_, kind in (((5000,), InvalidRequest), ((), InvalidRequest)):
            with pytest.raises(kind):
                await engine.embed(EmbeddingRequest([TokenPrompt(ids_)]))


async def test_what_is_too_long_is_refused_and_the_others_are_served(bert: Path) -> None:
    async with opened(bert) as engine:
        for text in ("fox " * 200, "x" * 1_000_000):
            with pytest.raises(ContextLengthExceeded) as caught:
                await vectors(engine, ["a", text])
            assert caught.value.param == "input"
        with pytest.raises(InvalidRequest) as refused:
            await vectors(engine, ["a"], dimensions=49)
        assert refused.value.param == "dimensions"
        assert (await vectors(engine, ["a"])).shape == (1, 48)


async def test_a_cross_encoder_scores_pairs_as_transformers_does_and_cuts_long_documents(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = tiny_cross_encoder(tmp_path / "cross")
    documents = ["lazy dog", "你好", "", "brown fox " * 200]
    engine = await open_rerank_engine(spec(path), silent)
    try:
        got = await engine.rank(RankingRequest("quick fox", documents))
        with pytest.raises(ContextLengthExceeded):
            await engine.rank(RankingRequest("fox " * 200, ["a"]))
        with pytest.raises(InvalidRequest):
            await engine.embed(EmbeddingRequest([TextPrompt("a")]))
        with pytest.raises(InvalidRequest):
            await anext(engine.generate(GenerationRequest(TextPrompt("a"))))
    finally:
        await engine.close()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    for score, document in zip(got.scores, documents, strict=True):
        inputs = tokenizer(["quick fox"], [document], truncation="only_second", max_length=128, return_tensors="pt")
        with torch.inference_mode():
            assert score == pytest.approx(float(model(**inputs).logits.sigmoid()), abs=1e-5)


@pytest.mark.parametrize("num_threads", [1, 2])
async def test_many_requests_share_batches_and_each_gets_its_own(bert: Path, num_threads: int) -> None:
    texts = [f"{'fox ' * (n % 9)}{n}" for n in range(60)]
    async with opened(bert, max_running=64, num_threads=num_threads) as engine:
        before = engine.stats().num_steps
        alone = [(await vectors(engine, [text]))[0] for text in texts]
        steps_alone = engine.stats().num_steps - before
        together = await asyncio.gather(*(vectors(engine, [text]) for text in texts))
        steps_together = engine.stats().num_steps - before - steps_alone
    assert np.abs(np.stack(alone) - np.concatenate(together)).max() < 1e-5
    assert steps_alone == 60
    assert steps_together <= 20


class Gate:
    """A model that runs when it is let, fails at token 13, gives NaN at token 14, and remembers what it ran."""

    width = 1

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.entered = asyncio.Event()
        self.batches: list[list[int]] = []
        self.free = threading.Event()

    def run(self, sequences: Sequence[TokenSequence]) -> Any:
        self.batches.append([s.ids[0] for s in sequences])
        self._loop.call_soon_threadsafe(self.entered.set)
        assert self.free.wait(10)
        if any(s.ids[0] == 13 for s in sequences):
            raise RuntimeError("planted")
        return np.array([[np.nan if s.ids[0] == 14 else s.ids[0]] for s in sequences], np.float32)


@asynccontextmanager
async def gated(bert: Path, *, is_reentrant: bool = True, **fields: Any) -> AsyncIterator[tuple[EmbeddingEngine, Gate]]:
    gate = Gate(asyncio.get_running_loop())
    loaded = replace(load(spec(bert), silent, scores_pairs=False), model=gate, is_reentrant=is_reentrant)
    engine = EmbeddingEngine(loaded, spec(bert, **fields))
    try:
        yield engine, gate
    finally:
        gate.free.set()
        await engine.close()


def ask(engine: EmbeddingEngine, *ids: int, num_tokens: int = 1) -> asyncio.Task[Any]:
    return asyncio.create_task(engine.embed(EmbeddingRequest([TokenPrompt((i,) * num_tokens) for i in ids])))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.001)


async def test_two_batches_run_side_by_side_and_a_third_waits(bert: Path) -> None:
    async with gated(bert, num_threads=2) as (engine, gate):
        first = ask(engine, 5)
        await until(lambda: gate.batches == [[5]])
        second = ask(engine, 6)
        await until(lambda: gate.batches == [[5], [6]])
        third = ask(engine, 7)
        await asyncio.sleep(0.05)
        assert gate.batches == [[5], [6]]
        assert not first.done()
        gate.free.set()
        replies = await asyncio.gather(first, second, third)
    assert [reply.vectors.tolist() for reply in replies] == [[[5.0]], [[6.0]], [[7.0]]]


async def test_many_texts_are_shared_out_among_idle_lanes(bert: Path) -> None:
    async with gated(bert, num_threads=2) as (engine, gate):
        task = ask(engine, *range(20, 36), num_tokens=20)
        await until(lambda: len(gate.batches) == 2)
        gate.free.set()
        await task
    assert sorted(len(batch) for batch in gate.batches) == [8, 8]


async def test_a_text_longer_than_all_lanes_run_at_once_waits_for_its_turn_alone(bert: Path) -> None:
    async with gated(bert, num_threads=2, prefill_chunk_tokens=4) as (engine, gate):
        running = ask(engine, 5)
        await until(lambda: gate.batches == [[5]])
        long, later = ask(engine, 6, num_tokens=9), ask(engine, 7)
        await asyncio.sleep(0.05)
        assert gate.batches == [[5]]
        gate.free.set()
        await asyncio.gather(running, long, later)
    assert gate.batches == [[5], [6], [7]]


async def test_a_model_that_keeps_state_runs_one_batch_at_a_time(bert: Path) -> None:
    async with gated(bert, is_reentrant=False, num_threads=2) as (engine, gate):
        tasks = [ask(engine, 5)]
        await until(lambda: gate.batches == [[5]])
        tasks.append(ask(engine, 6))
        await asyncio.sleep(0.05)
        assert gate.batches == [[5]]
        gate.free.set()
        await asyncio.gather(*tasks)


@pytest.mark.parametrize(
    ("parameters", "is_reentrant"),
    [
        (None, True),
        ({"rope_type": "default", "rope_theta": 1e4}, True),
        ({"rope_type": "dynamic", "factor": 2.0}, False),
        ({"full_attention": {"rope_type": "longrope"}, "sliding_attention": {"rope_type": "default"}}, False),
    ],
)
def test_rotary_frequencies_that_change_with_the_text_are_state(
    bert: Path, parameters: dict[str, Any] | None, is_reentrant: bool
) -> None:
    assert is_reentrant_with(spec(bert), SimpleNamespace(rope_parameters=parameters)) == is_reentrant
    assert not is_reentrant_with(spec(bert, trust_remote_code=True), SimpleNamespace(rope_parameters=parameters))


async def test_a_text_that_fails_costs_its_own_request_only(bert: Path) -> None:
    async with gated(bert) as (engine, gate):
        tasks = [ask(engine, 5), ask(engine, 6, 13), ask(engine, 14), ask(engine, 7)]
        gate.free.set()
        first, failed, invalid, last = await asyncio.gather(*tasks, return_exceptions=True)
    assert (first.vectors.tolist(), last.vectors.tolist()) == ([[5.0]], [[7.0]])
    assert isinstance(failed, Internal)
    assert isinstance(invalid, Internal)
    assert "planted" not in str(failed)


async def test_who_leaves_the_queue_is_never_run_and_a_full_queue_says_so(bert: Path) -> None:
    async with gated(bert, max_running=1, max_queued=2) as (engine, gate):
        running = ask(engine, 5)
        await gate.entered.wait()
        leaving, staying = ask(engine, 6), ask(engine, 7)
        while engine.stats().num_queued < 2:
            await asyncio.sleep(0)
        assert engine.stats().num_running == 1
        with pytest.raises(Overloaded):
            await ask(engine, 8)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        gate.free.set()
        assert (await staying).vectors.tolist() == [[7.0]]
        await running
        assert gate.batches == [[5], [7]]
        assert (engine.stats().num_running, engine.stats().num_queued) == (0, 0)


@pytest.mark.parametrize("fields", [{"quantize": "int8"}, {"devices": ("cpu", "cpu")}])
def test_options_that_it_does_not_have_are_refused(bert: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedParameter):
        load(spec(bert, **fields), silent, scores_pairs=False)


def test_a_model_that_cannot_be_served_says_why(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match="2 labels"):
        load(spec(tiny_cross_encoder(tmp_path / "two", num_labels=2)), silent, scores_pairs=True)
    write_modules(bert, ("WordWeights", {}))
    with pytest.raises(ModelLoadFailed, match="WordWeights"):
        load(spec(bert), silent, scores_pairs=False)
    write_modules(bert, ("Pooling", {"pooling_mode": "attention"}))
    with pytest.raises(ModelLoadFailed, match="attention"):
        load(spec(bert), silent, scores_pairs=False)


def test_an_encoder_without_a_head_is_not_served_as_a_cross_encoder_with_random_weights(bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "id2label": {"0": "LABEL_0"}}))
    with pytest.raises(ModelLoadFailed, match="lack"):
        load(spec(bert), silent, scores_pairs=True)


async def test_it_has_no_chat_template(bert: Path) -> None:
    async with opened(bert) as engine:
        with pytest.raises(UnsupportedParameter):
            await engine.tokenize(ChatPrompt([{"role": "user", "content": "a"}]))
        assert await engine.detokenize(await engine.tokenize(TextPrompt("fox", add_special_tokens=False))) == "fox"
