"""Beam search: as a naive one over whole sequences finds it, alone, in company, and while others leave."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hostler.errors import Internal, UnsupportedParameter

from tests.kept import CannotFetch
from tests.models.clips import librivox, wav, word_error_rate
from tests.models.real import pulled
from tests.models.tiny_whisper import ids, tiny_whisper
from tests.workers.test_hearing import MOST_TOKENS, decode, heard, noise, opened, scorer, silent, spec, told
from workers.engine import LoadSpec, TextDelta
from workers.hearing.beams import Beam, Search, advance, moves
from workers.hearing.decoding import Wanted
from workers.hearing.opening import load, open_hearing_engine
from workers.hearing.rules import Choice, choose
from workers.host import WorkerHost
from workers.transcription import TranscriptionRequest

END, SMALL = 0, 7

Said = tuple[int, ...]
Logprobs = Callable[[Said], Sequence[float]]


def naive(logprobs: Logprobs, width: int, end: int, most: int) -> tuple[Said, float]:
    """Return the best sequence with its end, if it came to it, and its logprob: as OpenAI's decoding does, by whole
    sequences.
    """
    going: dict[Said, float] = {(): 0.0}
    ended: dict[Said, float] = {}
    for _ in range(most):
        scores: dict[Said, float] = {}
        for said, total in going.items():
            found = sorted(enumerate(logprobs(said)), key=lambda pair: pair[1], reverse=True)[: width + 1]
            scores |= {(*said, token): total + logprob for token, logprob in found if logprob > float("-inf")}
        going = {}
        for said in sorted(scores, key=scores.__getitem__, reverse=True):
            if said[-1] != end:
                going[said] = scores[said]
            elif len(ended) < width:
                ended[said] = scores[said]
            if len(going) == width:
                break
        if len(ended) == width or not going:
            break
    for said in sorted(going, key=going.__getitem__, reverse=True)[: width - len(ended)]:
        ended[said] = going[said]
    best = max(ended, key=lambda said: ended[said] / (len(said) - (said[-1] == end)))
    return best, ended[best]


def language(seed: int, *, holes: float = 0.0) -> Logprobs:
    """Return random logprobs that depend on all that was said; some tokens are impossible. Nothing ends at once."""
    known: dict[Said, list[float]] = {}

    def logprobs(said: Said) -> list[float]:
        if said not in known:
            draw = random.Random(f"{seed} {said}")
            logits = [draw.gauss(0, 2) if draw.random() >= holes else float("-inf") for _ in range(SMALL)]
            logits[END if said else SMALL - 1] = draw.gauss(0.5, 1)
            if not said:
                logits[END] = float("-inf")
            known[said] = torch.tensor(logits, dtype=torch.float64).log_softmax(0).tolist()
        return known[said]

    return logprobs


def likeliest(logprobs: Logprobs, said: Said, count: int) -> list[Choice]:
    choices = [Choice(token, logprob) for token, logprob in enumerate(logprobs(said))]
    return sorted(choices, key=lambda choice: choice.logprob, reverse=True)[:count]


def walked(logprobs: Logprobs, width: int, most: int) -> Iterator[tuple[Search, Search, Said]]:
    """Yield each step of a search: where it stood, where it stands, and the parents."""
    search = Search()
    while not search.is_over(width) and search.num_said < most:
        before, choices = search, [likeliest(logprobs, beam.said, width + 1) for beam in search.beams]
        search, parents = advance(before, choices, width, END)
        yield before, search, parents


@pytest.mark.parametrize("width", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("holes", [0.0, 0.7])
def test_a_search_finds_what_the_naive_one_finds(width: int, holes: float) -> None:
    for seed in range(40):
        logprobs = language(seed, holes=holes)
        *_, (_, search, _) = walked(logprobs, width, 9)
        best = search.best(width, END)
        said, total = naive(logprobs, width, END, 9)
        assert best.said == said
        assert best.total == pytest.approx(total)
        assert sum(best.logprobs) == pytest.approx(total)


def test_with_beams_for_all_sequences_the_best_of_all_is_found() -> None:
    for seed in range(5):
        logprobs = language(seed)
        every: dict[Said, float] = {}
        for length in range(1, 4):
            for words in itertools.product(range(1, SMALL), repeat=length):
                steps = [*words, END] if length < 3 else words
                total = sum(logprobs(words[:index])[token] for index, token in enumerate(steps))
                every[tuple(steps)] = total / length
        *_, (_, search, _) = walked(logprobs, 10_000, 3)
        assert search.best(10_000, END).said == max(every, key=every.__getitem__)


def test_one_beam_takes_the_likeliest_until_the_end() -> None:
    logprobs = language(3)
    *_, (_, search, _) = walked(logprobs, 1, 9)
    said: Said = ()
    while len(said) < 9 and said[-1:] != (END,):
        said = (*said, likeliest(logprobs, said, 1)[0].token)
    assert search.best(1, END).said == said


def test_the_beam_with_the_best_token_on_average_counts_and_unfinished_ones_only_where_too_few_have_ended() -> None:
    short, long = Beam((1, END), (-1.0, -1.0), -2.0), Beam((1, 2, 3, END), (-1.0,) * 4, -4.0)
    going = (Beam((5, 5), (-0.1, -0.1), -0.2),)
    assert Search(going, (short, long)).best(2, END) == long
    assert Search(going, (short, long)).best(3, END) == going[0]
    assert Search((), ()).best(3, END) == Beam()


def test_places_hold_each_beams_tokens_after_the_copies_that_are_asked_for() -> None:
    num_copied = num_kept = 0
    for seed in range(30):
        places: list[list[int]] = [[-1] * 9 for _ in range(4)]
        for before, after, parents in walked(language(seed), 4, 9):
            for place, beam in zip(places, before.beams, strict=False):
                place[: len(beam.said)] = [*place[: len(beam.said) - 1], *beam.said[-1:]]
                assert place[: len(beam.said)] == list(beam.said)
            wanted = list(moves(before, parents))
            copied = [places[source][same:] for source, _, same in wanted]
            for (_, target, same), tokens in zip(wanted, copied, strict=True):
                places[target][same:] = tokens
            assert [beam.said[:-1] for beam in after.beams] == [before.beams[parent].said for parent in parents]
            num_copied += len(wanted)
            num_kept += len(parents) - len(wanted)
    assert num_kept > num_copied > 0


def test_the_likeliest_tokens_come_with_their_logprobs_and_draws_alone() -> None:
    logits = torch.randn((3, 50), generator=torch.Generator().manual_seed(1))
    logits[:, 7:] = float("-inf")
    generators = [None, torch.Generator().manual_seed(5), None]
    found = choose(logits, [0.0, 0.8, 0.0], generators, count=4)
    assert [len(choices) for choices in found] == [4, 1, 4]
    for row in (0, 2):
        expected = logits[row].log_softmax(0).topk(4)
        assert [choice.token for choice in found[row]] == expected.indices.tolist()
        assert [choice.logprob for choice in found[row]] == pytest.approx(expected.values.tolist(), abs=1e-5)
    assert found[1] == choose(logits[1:2], [0.8], [torch.Generator().manual_seed(5)])[0]
    assert [choices[:1] for choices in (found[0], found[2])] == choose(logits[[0, 2]], [0, 0], [None, None])


# ---------------------------------------------------------------- the engine


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model that comes to an end now and then: with plain random weights, sure of itself, it does not."""
    from safetensors.torch import load_file, save_file

    path = tiny_whisper(tmp_path_factory.mktemp("whisper") / "tiny")
    weights = load_file(path / "model.safetensors")
    weights["model.decoder.embed_tokens.weight"][ids()["<|endoftext|>"]] *= 8.0
    weights["model.decoder.layer_norm.weight"] *= 0.3
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def never_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing look wrong, so that temperature 0 is the only one."""
    monkeypatch.setattr("workers.hearing.times.MIN_AVG_LOGPROB", -100.0)
    monkeypatch.setattr("workers.hearing.times.MAX_COMPRESSION_RATIO", 100.0)


@pytest.mark.parametrize("times", [True, False])
async def test_tokens_are_those_of_a_naive_search_over_transformers_model_alone_and_in_company(
    whisper: Path, never_wrong: None, times: bool
) -> None:
    from transformers import WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(whisper, dtype=torch.float32).eval()
    windows = [noise(seconds, seed) for seed, seconds in enumerate((3, 29, 11, 1, 6, 2, 8))]
    codes = ["en", "de", "ja", "de", "en", "en", "ja"]
    wanted = [Wanted(language=code, translate=code == "de", times=times) for code in codes]
    together = decode(whisper, windows, wanted, beams=3)
    num_ended = num_forked = 0
    for window, row in zip(windows, together, strict=True):
        scores = scorer(whisper, model, window, row.opening, times=times)

        def logprobs(said: Said, scores: Any = scores) -> list[float]:
            found: list[float] = scores(said).log_softmax(0).tolist()
            return found

        said, total = naive(logprobs, 3, ids()["<|endoftext|>"], MOST_TOKENS)
        (only,) = row.tries
        ended = said[-1] == ids()["<|endoftext|>"]
        assert only.tokens == (said[:-1] if ended else said)
        assert sum(only.logprobs) == pytest.approx(total, abs=1e-3)
        assert len(only.logprobs) == len(said)
        num_ended += ended
        num_forked += only.tokens != naive(logprobs, 1, ids()["<|endoftext|>"], MOST_TOKENS)[0][: len(only.tokens)]
    assert num_ended > 0
    assert num_forked > 0
    for window, want, row in zip(windows, wanted, together, strict=True):
        alone = decode(whisper, [window], [want], beams=3)[0]
        assert alone.tries[-1].tokens == row.tries[-1].tokens
        assert alone.no_speech_prob == pytest.approx(row.no_speech_prob, abs=1e-5)


async def test_above_temperature_0_a_window_draws_as_without_beams_beside_others_that_have_them(
    whisper: Path, never_wrong: None
) -> None:
    windows = [noise(5, seed) for seed in range(5)]
    wanted = [Wanted(language="en", temperature=(None, 0.8)[seed % 2], seed=seed) for seed in range(5)]
    mixed = [row.tries[-1].tokens for row in decode(whisper, windows, wanted, beams=4)]
    assert mixed[1::2] == [row.tries[-1].tokens for row in decode(whisper, windows[1::2], wanted[1::2])]
    assert mixed[::2] == [row.tries[-1].tokens for row in decode(whisper, windows[::2], wanted[::2], beams=4)]


async def test_what_looks_wrong_is_drawn_at_the_other_temperatures(
    whisper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.hearing.times.MIN_AVG_LOGPROB", 1.0)
    wanted = [Wanted(language="en", seed=seed) for seed in range(3)]
    rows = decode(whisper, [noise(5, seed) for seed in range(3)], wanted, beams=3)
    plain = decode(whisper, [noise(5, seed) for seed in range(3)], wanted)
    for row, other in zip(rows, plain, strict=True):
        assert sorted(one.temperature for one in row.tries) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
        drawn = [{one.tokens for one in tried.tries if one.temperature > 0} for tried in (row, other)]
        assert drawn[0] == drawn[1]


async def test_a_recording_that_leaves_on_its_way_changes_nothing_for_the_others(
    whisper: Path, never_wrong: None
) -> None:
    staying = [wav(noise(seconds, seed)) for seed, seconds in enumerate((20, 40, 8))]
    async with opened(whisper, beams=3) as engine:

        async def ask(data: bytes) -> list[Any]:
            return told(await heard(engine, data, temperature=None, segment_timestamps=True))

        alone = [await ask(data) for data in staying]
        leaving = engine.transcribe(TranscriptionRequest(wav(noise(200, 9)), language="en"))
        tasks = [asyncio.create_task(ask(data)) for data in staying]
        await anext(leaving)
        await leaving.aclose()
        assert await asyncio.gather(*tasks) == alone
        assert not engine._listener._decoding.rows


async def test_rows_that_leave_from_the_middle_take_all_their_beams_with_them(whisper: Path, never_wrong: None) -> None:
    windows, wanted = [noise(5, seed) for seed in range(4)], [Wanted(language="en")] * 4
    alone = [decode(whisper, [window], [want], beams=3)[0] for window, want in zip(windows, wanted, strict=True)]
    _, listener = load(spec(whisper, beams=3), silent)
    decoding: Any = listener._decoding
    with torch.inference_mode():
        states = listener._whisper.encode(listener._features(windows))
        rows = decoding.join(list(zip(range(4), wanted, strict=True)), states)
        for _ in range(5):
            decoding.step()
        decoding.leave([rows[0], rows[2]])
        while decoding.rows:
            decoding.leave(decoding.step())
    for index in (1, 3):
        assert rows[index].tries[-1].tokens == alone[index].tries[-1].tokens


async def test_a_window_without_valid_numbers_fails_alone(whisper: Path, never_wrong: None) -> None:
    async with opened(whisper, beams=3) as engine:
        good, features = wav(noise(20, 1)), engine._listener._features
        alone = await heard(engine, good, temperature=None)

        def poisoned(windows: Sequence[Any]) -> torch.Tensor:
            found = features(windows)
            for index, samples in enumerate(windows):
                if len(samples) < 16_000 * 10:
                    found[index] = float("nan")
            return found

        engine._listener._features = poisoned
        results = await asyncio.gather(
            *(heard(engine, data, temperature=None) for data in (wav(noise(5)), good)), return_exceptions=True
        )
        assert isinstance(results[0], Internal)
        assert told(results[1]) == told(alone)  # type: ignore[arg-type]
        engine._listener._features = features
        assert told(await heard(engine, wav(noise(20, 1)), temperature=None)) == told(alone)


async def test_beams_are_refused_by_engines_that_write_no_speech_down(tmp_path: Path) -> None:
    from hostler.lifecycle.v1 import lifecycle_pb2 as life

    from workers.translate import load_spec

    assert load_spec(life.LoadRequest(model="m", path="p", beams=5)).beams == 5
    assert load_spec(life.LoadRequest(model="m", path="p")).beams == 1
    for kind in (
        life.ENGINE_KIND_TEXT,
        life.ENGINE_KIND_UNSPECIFIED,
        life.ENGINE_KIND_SCRIPTED,
        life.ENGINE_KIND_EMBEDDING,
        life.ENGINE_KIND_RERANK,
        life.ENGINE_KIND_SPEECH,
    ):
        with pytest.raises(UnsupportedParameter) as refused:
            await WorkerHost._create(LoadSpec("m", str(tmp_path), beams=2), kind, silent)
        assert refused.value.param == "beams"


@pytest.mark.real_model
async def test_the_real_model_with_five_beams_hears_what_is_read() -> None:
    try:
        clips = librivox()
    except CannotFetch as reason:
        pytest.skip(str(reason))
    fields: Mapping[str, Any] = {"model": "whisper-base", "path": str(pulled("whisper-base"))}
    engine = await open_hearing_engine(LoadSpec(**fields, beams=5), silent)
    try:
        said = await asyncio.gather(*(heard(engine, wav(clip.samples), temperature=None) for clip in clips))
    finally:
        await engine.close()
    text = " ".join(event.text for events in said for event in events if isinstance(event, TextDelta))
    assert word_error_rate(" ".join(clip.text for clip in clips), text) <= 0.05
