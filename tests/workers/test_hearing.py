"""The hearing engine over a tiny Whisper with random weights: as transformers decodes it, alone and in company."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostler.errors import Internal, InvalidRequest, ModelLoadFailed, Overloaded, UnsupportedParameter

from tests.models.clips import RATE_HZ, wav
from tests.models.tiny_whisper import SIZES, ids, tiny_whisper
from workers.engine import GenerationRequest, LoadSpec, TextDelta, TextPrompt
from workers.hearing.decoding import Decoding, Row, Wanted
from workers.hearing.engine import HearingEngine
from workers.hearing.opening import load, multiplies_bfloat16, open_hearing_engine
from workers.transcription import Heard, Segment, TranscriptionFinish, TranscriptionRequest

Scorer = Callable[[Sequence[int]], torch.Tensor]
"""What a window has said so far → masked logits of what it says next."""

MOST_TOKENS = SIZES["max_target_positions"] // 2


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_whisper(tmp_path_factory.mktemp("whisper") / "tiny")


def spec(path: Path, **fields: Any) -> LoadSpec:
    return replace(LoadSpec(model="tiny", path=str(path), num_threads=1, dtype="float32"), **fields)


def silent(*_: object) -> None:
    """Progress that nobody looks at."""


def noise(seconds: float, seed: int = 0) -> Any:
    """Return loud noise with a pause after each second; the model, untrained, takes it for speech."""
    samples = np.random.default_rng(seed).normal(0, 3000, int(seconds * RATE_HZ))
    samples[(np.arange(len(samples)) % RATE_HZ) > 0.6 * RATE_HZ] *= 0.001
    return samples.clip(-32768, 32767).astype(np.int16)


def decode(path: Path, windows: Sequence[Any], wanted: Sequence[Wanted], **fields: Any) -> list[Row[int]]:
    """Decode windows together, joining three at a time while others run; return their rows in order."""
    _, listener = load(spec(path, **fields), silent)
    decoding: Decoding[int] = listener._decoding  # type: ignore[assignment]
    rows: dict[int, Row[int]] = {}
    waiting = list(range(len(windows)))
    with torch.inference_mode():
        while waiting or decoding.rows:
            if waiting and len(decoding.rows) <= listener._whisper.num_rows - 3:
                joining, waiting = waiting[:3], waiting[3:]
                states = listener._whisper.encode(listener._features([windows[i] for i in joining]))
                decoding.join([(i, wanted[i]) for i in joining], states)
            done = decoding.step()
            rows |= {row.item: row for row in done}
            decoding.leave(done)
    return [rows[i] for i in range(len(windows))]


@pytest.fixture(scope="module")
def transformers_own(whisper: Path) -> Any:
    from transformers import WhisperForConditionalGeneration

    return WhisperForConditionalGeneration.from_pretrained(whisper, dtype=torch.float32).eval()


def scorer(path: Path, model: Any, window: Any, opening: list[int], *, times: bool) -> Scorer:
    """Return what scores next tokens by transformers' model and its own rules, without a cache."""
    from transformers import WhisperFeatureExtractor
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        SuppressTokensAtBeginLogitsProcessor,
        SuppressTokensLogitsProcessor,
        WhisperTimeStampLogitsProcessor,
    )

    known, rules = ids(), LogitsProcessorList()
    rules.append(SuppressTokensLogitsProcessor([1, 2, 7, *sorted(known.values())[1:]]))
    rules.append(SuppressTokensAtBeginLogitsProcessor([3, known["<|endoftext|>"]], len(opening)))
    if times:
        rules.append(WhisperTimeStampLogitsProcessor(model.generation_config, len(opening)))
    else:
        rules.append(SuppressTokensLogitsProcessor(list(range(known["<|notimestamps|>"] + 1, SIZES["vocab_size"]))))
    extractor = WhisperFeatureExtractor.from_pretrained(path)
    features = extractor(window.astype(np.float32) / 32768, sampling_rate=RATE_HZ, return_tensors="pt").input_features
    with torch.inference_mode():
        states = model.model.encoder(features)

    @torch.inference_mode()
    def scores(said: Sequence[int]) -> torch.Tensor:
        tokens = torch.tensor([[*opening, *said]])
        logits = model(encoder_outputs=states, decoder_input_ids=tokens, use_cache=False).logits[:, -1]
        masked: torch.Tensor = rules(tokens, logits)[0]
        return masked

    return scores


def greedy(path: Path, model: Any, window: Any, opening: list[int], *, times: bool) -> list[int]:
    """Return the likeliest tokens by transformers' model and its own rules, to the end or to 32."""
    scores = scorer(path, model, window, opening, times=times)
    said: list[int] = []
    while len(said) < MOST_TOKENS:
        said.append(int(scores(said).argmax()))
        if said[-1] == ids()["<|endoftext|>"]:
            return said[:-1]
    return said


@pytest.mark.parametrize("times", [True, False])
async def test_tokens_are_those_of_transformers_own_decoding_alone_and_in_company(
    whisper: Path, transformers_own: Any, times: bool
) -> None:
    windows = [noise(seconds, seed) for seed, seconds in enumerate((3, 29, 11, 1))]
    languages = ["en", "de", "ja", "de"]
    # A temperature that is nearly 0 draws the likeliest and is never tried anew.
    wanted = [Wanted(language=code, translate=code == "de", times=times, temperature=1e-6) for code in languages]
    together = decode(whisper, windows, wanted)
    for window, row in zip(windows, together, strict=True):
        assert list(row.tries[-1].tokens) == greedy(whisper, transformers_own, window, row.opening, times=times)
        assert len(row.tries[-1].tokens) > 3
    alone = [decode(whisper, [window], [want])[0] for window, want in zip(windows, wanted, strict=True)]
    assert [row.tries[-1].tokens for row in alone] == [row.tries[-1].tokens for row in together]


async def test_the_language_that_is_found_out_is_transformers_own(whisper: Path, transformers_own: Any) -> None:
    from transformers import WhisperFeatureExtractor

    windows = [noise(4, seed) for seed in range(4)]
    rows = decode(whisper, windows, [Wanted(temperature=1e-6)] * 4)
    extractor = WhisperFeatureExtractor.from_pretrained(whisper)
    floats = [window.astype(np.float32) / 32768 for window in windows]
    features = extractor(floats, sampling_rate=RATE_HZ, return_tensors="pt").input_features
    own = transformers_own.detect_language(features, generation_config=transformers_own.generation_config)
    codes = {number: token.strip("<|>") for token, number in ids().items()}
    assert [row.language for row in rows] == [codes[int(number)] for number in own]


async def test_what_looks_wrong_is_tried_at_every_temperature_and_the_best_try_counts(
    whisper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.hearing.times.MIN_AVG_LOGPROB", 1.0)
    (row,) = decode(whisper, [noise(5)], [Wanted(language="en")])
    assert sorted(one.temperature for one in row.tries) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    best = row.tries[-1]
    fine = [one for one in row.tries if one.compression_ratio <= 2.4] or row.tries
    assert best.avg_logprob == max(one.avg_logprob for one in fine)


async def test_draws_at_a_temperature_depend_on_nothing_but_the_recording(whisper: Path) -> None:
    windows = [noise(5, seed) for seed in range(3)]
    wanted = [Wanted(language="en", temperature=0.8, seed=seed) for seed in range(3)]
    together = [row.tries[-1].tokens for row in decode(whisper, windows, wanted)]
    alone = [decode(whisper, [windows[i]], [wanted[i]])[0].tries[-1].tokens for i in range(3)]
    assert together == alone
    assert len(set(together)) == 3


@pytest.mark.skipif(not multiplies_bfloat16(), reason="this processor does not multiply bfloat16")
def test_products_in_bfloat16_change_logits_by_little_more_than_rounding(whisper: Path) -> None:
    logits = []
    for dtype in ("float32", "auto"):
        _, listener = load(spec(whisper, dtype=dtype), silent)
        model, opening = listener._whisper, [ids()["<|startoftranscript|>"], 5, 6]
        states = model.encode(listener._features([noise(5, seed) for seed in range(2)]))
        for row in range(2):
            model.hear(row, states[row])
        begun = model.begin(0, [opening, opening], [-1])[:, 0]
        logits.append(torch.cat([begun, model.step([7, 8], [3, 3])]))
    assert model.dtype == torch.bfloat16
    exact, rough = logits
    assert (exact - rough).abs().max() < 0.05 * exact.std()
    likeliest = exact.argmax(dim=1)
    assert (exact.log_softmax(1) - rough.log_softmax(1))[range(4), likeliest].abs().max() < 0.05


@asynccontextmanager
async def opened(path: Path, **fields: Any) -> AsyncIterator[HearingEngine]:
    engine = await open_hearing_engine(spec(path, **fields), silent)
    try:
        yield engine
    finally:
        await engine.close()


async def heard(engine: HearingEngine, data: bytes, **fields: Any) -> list[Heard]:
    fields = {"temperature": 1e-6, "language": "en", **fields}
    return [event async for event in engine.transcribe(TranscriptionRequest(data, **fields))]


async def test_a_long_recording_is_told_in_order_with_times_that_rise_and_lie_within_it(whisper: Path) -> None:
    async with opened(whisper) as engine:
        events = await heard(engine, wav(noise(100)), segment_timestamps=True, word_timestamps=True, logprobs=True)
        plain = await heard(engine, wav(noise(100)))
    *told, finish = events
    assert isinstance(finish, TranscriptionFinish)
    assert (finish.language, finish.language_name, round(finish.duration_s, 3)) == ("en", "english", 100.0)
    segments = [event for event in told if isinstance(event, Segment)]
    assert [segment.id for segment in segments] == list(range(len(segments)))
    starts = [segment.start_s for segment in segments]
    assert starts == sorted(starts)
    assert starts[-1] > 75  # the last window's
    assert all(segment.start_s <= segment.end_s <= 100.0 for segment in segments)
    for segment in segments:
        assert "".join(word.text for word in segment.words) == segment.text
        times = [time for word in segment.words for time in (word.start_s, word.end_s)]
        assert times == sorted(times)
        assert segment.start_s <= times[0] <= times[-1] <= segment.end_s
    texts = [event for event in told if isinstance(event, TextDelta)]
    assert len(texts) >= 4
    for event in texts:
        spelled = b"".join(item.token for item in event.logprobs).decode("utf-8", errors="replace")
        assert spelled.strip() == event.text.strip()
        assert all(item.logprob <= 0 for item in event.logprobs)
    assert not any(isinstance(event, Segment) for event in plain)
    assert isinstance(plain[0], TextDelta)
    assert not plain[0].logprobs


async def test_many_recordings_at_once_are_each_told_as_alone(whisper: Path) -> None:
    recordings = [wav(noise(seconds, seed)) for seed, seconds in enumerate((3, 40, 8, 2, 31))]
    async with opened(whisper) as engine:
        alone = [await heard(engine, data, segment_timestamps=True) for data in recordings]
        together = await asyncio.gather(*(heard(engine, data, segment_timestamps=True) for data in recordings))
        assert engine.stats().num_queued == engine.stats().num_running == 0
    assert [told(events) for events in together] == [told(events) for events in alone]


def told(events: Sequence[Heard]) -> list[Any]:
    """Return what is the same in any company: everything but the last bits of logprobs."""
    return [
        (event.text, event.start_s, event.end_s, event.token_ids) if isinstance(event, Segment) else event
        for event in events
    ]


async def test_silence_says_nothing_and_has_a_length(whisper: Path) -> None:
    async with opened(whisper) as engine:
        (finish,) = await heard(engine, wav(np.zeros(7 * RATE_HZ, np.int16)), segment_timestamps=True)
    assert isinstance(finish, TranscriptionFinish)
    assert (finish.duration_s, finish.num_completion_tokens) == (7.0, 0)


async def test_a_request_that_leaves_frees_its_rows_and_others_go_on(whisper: Path) -> None:
    async with opened(whisper) as engine:
        alone = await heard(engine, wav(noise(20, 1)))
        leaving = engine.transcribe(TranscriptionRequest(wav(noise(200)), language="en", temperature=1e-6))
        staying = asyncio.create_task(heard(engine, wav(noise(20, 1))))
        await anext(leaving)
        await leaving.aclose()
        assert await staying == alone
        assert await heard(engine, wav(noise(20, 1))) == alone
        assert not engine._listener._decoding.rows
        assert not engine._listener._recordings


async def test_a_failure_of_the_model_costs_the_request_that_it_hits_alone(
    whisper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(whisper) as engine:
        good, features = wav(noise(4, 1)), engine._listener._features
        alone = await heard(engine, good)

        def failing(windows: Sequence[Any]) -> torch.Tensor:
            if any(len(samples) > 5 * RATE_HZ for samples in windows):
                raise RuntimeError("no luck")
            return features(windows)

        monkeypatch.setattr(engine._listener, "_features", failing)
        one, other = await asyncio.gather(heard(engine, wav(noise(9))), heard(engine, good), return_exceptions=True)
        assert isinstance(one, Internal)
        assert other == alone
        monkeypatch.setattr(engine._listener, "_features", lambda windows: features(windows) * float("nan"))
        with pytest.raises(Internal):
            await heard(engine, good)
        monkeypatch.setattr(engine._listener, "_features", features)
        assert await heard(engine, good) == alone


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"language": "klingon"}, InvalidRequest, "language"),
        ({"language": "fr"}, UnsupportedParameter, "language"),
    ],
)
async def test_languages_are_refused_by_name(whisper: Path, fields: Any, error: Any, param: str) -> None:
    async with opened(whisper) as engine:
        with pytest.raises(error) as refused:
            await heard(engine, wav(noise(1)), **fields)
        assert refused.value.param == param
        for name in ("German", "de", "de-AT", "DE"):
            finish = (await heard(engine, wav(noise(1)), language=name))[-1]
            assert isinstance(finish, TranscriptionFinish)
            assert finish.language == "de"


async def test_a_prompt_changes_what_is_said_and_only_its_end_counts(whisper: Path) -> None:
    async with opened(whisper) as engine:
        plain = await heard(engine, wav(noise(5)))
        prompted = await heard(engine, wav(noise(5)), prompt="def main")
        assert prompted[0] != plain[0]
        spelled = await heard(engine, wav(noise(5)), prompt="<|startoftranscript|>")
        assert isinstance(spelled[-1], TranscriptionFinish)
        assert spelled[-1].num_prompt_tokens > 250 + 5  # of plain characters, no control token


async def test_what_the_engine_cannot_do_is_refused(whisper: Path, tiny_model: Path) -> None:
    async with opened(whisper, max_running=1, max_queued=0) as engine:
        with pytest.raises(InvalidRequest):
            await anext(engine.generate(GenerationRequest(TextPrompt("a"))))
        assert await engine.detokenize(await engine.tokenize(TextPrompt("Hello", add_special_tokens=False))) == "Hello"
        first = engine.transcribe(TranscriptionRequest(wav(noise(60)), language="en", temperature=1e-6))
        await anext(first)
        with pytest.raises(Overloaded):
            await heard(engine, wav(noise(1)))
        await first.aclose()
        for data in (b"", b"a text that is no sound", wav(np.zeros(0, np.int16))):
            with pytest.raises(InvalidRequest) as refused:
                await heard(engine, data)
            assert refused.value.param == "file"
    for fields in ({"quantize": "int8"}, {"devices": ("cpu", "cpu")}):
        with pytest.raises(UnsupportedParameter):
            await open_hearing_engine(spec(whisper, **fields), silent)
    with pytest.raises(ModelLoadFailed, match="qwen3"):
        await open_hearing_engine(spec(tiny_model), silent)
