"""What is said: the speaking engine over tiny voices and models, and the phonemes that they read."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hostler.errors import (
    Internal,
    InvalidRequest,
    ModelLoadFailed,
    UnsupportedParameter,
)

from tests.models.tiny_voices import RATE_HZ, SAMPLES_PER_SYMBOL, tiny_piper, tiny_vits
from tests.workers.sounds import collected, decoded, pitch_hz
from workers.engine import GenerationRequest, LoadSpec, TextPrompt
from workers.speaking.engine import SpeakingEngine
from workers.speaking.opening import open_speaking_engine
from workers.speaking.phonemes import Phonemizer
from workers.utterances import SpeechRequest


def spec(path: Path, **fields: Any) -> LoadSpec:
    return replace(LoadSpec(model="tiny", path=str(path), num_threads=1), **fields)


@asynccontextmanager
async def opened(path: Path, **fields: Any) -> AsyncIterator[SpeakingEngine]:
    engine = await open_speaking_engine(spec(path, **fields), lambda *_: None)
    try:
        yield engine
    finally:
        await engine.close()


def request(text: str = "hello there", **fields: Any) -> SpeechRequest:
    return SpeechRequest(text, **{"format": "pcm", **fields})


# ---------------------------------------------------------------- Piper's voices


async def test_a_voice_says_every_symbol_once_and_counts_them(tmp_path: Path) -> None:
    async with opened(tiny_piper(tmp_path)) as engine:
        assert (engine.facts.engine, engine.facts.voices) == ("speech", ("hum",))
        data, finish = await collected(engine.speak(request("ab.")))
        # ^ _ a _ b _ . _ $
        assert (finish.num_symbols, finish.num_frames) == (9, 9)
        assert finish.duration_s == 9 * SAMPLES_PER_SYMBOL / RATE_HZ
        samples, rate_hz = decoded(data, "pcm")
        assert len(samples) / rate_hz == pytest.approx(finish.duration_s, abs=0.005)
        assert engine.stats().num_completion_tokens_total >= 9


async def test_speed_shortens_what_is_said_and_leaves_its_pitch(tmp_path: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog " * 4
    async with opened(tiny_piper(tmp_path)) as engine:
        lengths = {}
        for speed in (0.5, 1.0, 2.0):
            data, finish = await collected(engine.speak(request(text, speed=speed)))
            lengths[speed] = finish.duration_s
            assert pitch_hz(*decoded(data, "pcm")) == pytest.approx(200, abs=3)
        assert lengths[0.5] == pytest.approx(2 * lengths[1.0], rel=0.02)
        assert lengths[2.0] == pytest.approx(lengths[1.0] / 2, rel=0.02)
        for speed in (0.2, 4.5):
            with pytest.raises(InvalidRequest, match="speed"):
                await collected(engine.speak(request(speed=speed)))


async def test_each_speaker_of_a_voice_has_its_own_sound(tmp_path: Path) -> None:
    async with opened(tiny_piper(tmp_path, ["low", "mid", "high"])) as engine:
        assert engine.facts.voices == ("low", "mid", "high")
        for voice, hertz in (("low", 200), ("", 200), ("mid", 300), ("high", 400)):
            data, _ = await collected(engine.speak(request("a" * 200, voice=voice)))
            assert pitch_hz(*decoded(data, "pcm")) == pytest.approx(hertz, abs=3)
        with pytest.raises(InvalidRequest, match="low, mid, high") as caught:
            await collected(engine.speak(request(voice="alloy")))
        assert caught.value.param == "voice"


@pytest.mark.parametrize("text", ["", "  ", "12 34", "...", "😀😀", "日本"])
async def test_what_has_no_sound_is_refused_before_there_is_any(tmp_path: Path, text: str) -> None:
    async with opened(tiny_piper(tmp_path)) as engine:
        with pytest.raises(InvalidRequest, match="nothing") as caught:
            await collected(engine.speak(request(text)))
        assert caught.value.param == "input"


async def test_a_piece_without_sound_is_passed_over(tmp_path: Path) -> None:
    async with opened(tiny_piper(tmp_path)) as engine:
        _, finish = await collected(engine.speak(request("...\n😀.\nab.\n...\n")))
        assert finish.num_symbols == 9


async def test_more_than_a_model_is_given_at_once_is_said_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tiny_piper(tmp_path)) as engine:
        monkeypatch.setattr("workers.speaking.piper._MAX_PHONEMES", 20)
        before = engine.stats().num_steps
        _, finish = await collected(engine.speak(request("aaaa bbbb cccc dddd eeee ffff " + "g" * 30)))
        # Cut after the blank behind "dddd", then in the middle of the g's, for want of a late blank.
        assert engine.stats().num_steps - before == 3
        assert finish.num_symbols == 2 * 60 + 3 * len("^_$")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phoneme_type": "pinyin"}, "pinyin"),
        ({"espeak": {"voice": "ar"}}, "Arabic"),
        ({"phoneme_type": "espeak", "espeak": {"voice": "no-such"}}, "cannot speak"),
        ({"audio": {"sample_rate": 0}}, "sample rate"),
        ({"audio": {}}, "not the configuration"),
        ({"phoneme_id_map": {"a": [1]}}, "symbols"),
        ({"phoneme_id_map": "a"}, "not the configuration"),
        ({"num_speakers": 4}, "inputs"),
    ],
)
async def test_a_voice_that_cannot_be_served_says_why(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadFailed, match=message):
        await open_speaking_engine(spec(tiny_piper(tmp_path, **change)), lambda *_: None)


async def test_a_damaged_voice_is_a_clear_error(tmp_path: Path) -> None:
    tiny_piper(tmp_path)
    (tmp_path / "hum.onnx").write_bytes((tmp_path / "hum.onnx").read_bytes()[:-40])
    with pytest.raises(ModelLoadFailed, match=r"hum\.onnx cannot be loaded"):
        await open_speaking_engine(spec(tmp_path), lambda *_: None)


@pytest.mark.parametrize("option", ["quantize", "adapters", "devices"])
async def test_options_that_the_engine_does_not_have_are_refused(tmp_path: Path, option: str) -> None:
    value = {"quantize": "int8", "adapters": ("x",), "devices": ("cpu", "cpu")}[option]
    with pytest.raises(UnsupportedParameter) as caught:
        await open_speaking_engine(spec(tiny_piper(tmp_path), **{option: value}), lambda *_: None)
    assert caught.value.param == option


# ---------------------------------------------------------------- phonemes


@pytest.fixture
def phonemizer() -> Iterator[Phonemizer]:
    made = Phonemizer()
    yield made
    made.close()


def test_espeak_reads_sentences_with_their_punctuation(phonemizer: Phonemizer) -> None:
    sentences = ["".join(s) for s in phonemizer.sentences("en-us", "Hello world. How are you, my friend?")]
    assert len(sentences) == 2
    assert sentences[0].startswith("həlˈ")
    assert sentences[0].endswith(".")
    assert ", " in sentences[1]
    assert sentences[1].endswith("?")


def test_the_phonemizer_lives_through_whatever_it_is_given(phonemizer: Phonemizer) -> None:
    for text in (
        "\ud800",
        "a\u0000b",
        "<speak>x</speak>",
        "[[x]]",
        "🙂" * 500,
        "\u202e\u200b",
        "א" * 3000,
        "%s%n" * 100,
    ):
        try:
            phonemizer.sentences("en-us", text)
        except Internal:
            continue
    assert phonemizer.sentences("en-us", "fine")
    with pytest.raises(Internal):
        phonemizer.sentences("no-such-language", "a")


def test_a_phonemizer_that_died_costs_one_request(phonemizer: Phonemizer) -> None:
    assert phonemizer.sentences("en-us", "one")
    child = phonemizer._child
    assert child is not None
    child.kill()
    child.wait()
    with pytest.raises(Internal):
        phonemizer.sentences("en-us", "two")
    assert phonemizer.sentences("en-us", "three")


def test_a_phonemizer_that_hangs_is_replaced(phonemizer: Phonemizer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert phonemizer.sentences("en-us", "one")
    assert phonemizer._child is not None
    process = psutil.Process(phonemizer._child.pid)
    process.suspend()
    monkeypatch.setattr("workers.speaking.phonemes._TIMEOUT_S", 0.2)
    with pytest.raises(Internal):
        phonemizer.sentences("en-us", "two")
    assert not process.is_running()
    monkeypatch.undo()
    assert phonemizer.sentences("en-us", "three")


async def test_the_phonemizers_process_ends_with_its_engine(tmp_path: Path) -> None:
    async with opened(tiny_piper(tmp_path, phonemes="espeak")) as engine:
        await collected(engine.speak(request("a fable")))
        children = [p for p in psutil.Process().children() if "workers.speaking.espeak" in p.cmdline()]
        assert len(children) == 1
    assert not children[0].is_running()


# ---------------------------------------------------------------- VITS


async def test_vits_says_what_transformers_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import VitsModel, VitsTokenizer

    path = tiny_vits(tmp_path)
    # Without its noise the model is a function of the text.
    monkeypatch.setattr(torch, "randn", torch.zeros)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    expected = VitsModel.from_pretrained(path)(
        **VitsTokenizer.from_pretrained(path)("Hello there.", return_tensors="pt")
    )
    async with opened(path) as engine:
        data, finish = await collected(engine.speak(request("Hello there.")))
    assert engine.facts.architecture == "VitsModel"
    wanted = expected.waveform[0].detach().numpy()
    assert finish.duration_s == len(wanted) / RATE_HZ
    from workers.speaking.encoding import AudioEncoder

    encoder = AudioEncoder("pcm", RATE_HZ)
    assert data == encoder.encode(wanted) + encoder.finish()


async def test_vits_honours_speed_and_voices(tmp_path: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog and then it goes home again to sleep"
    async with opened(tiny_vits(tmp_path, num_speakers=3)) as engine:
        assert engine.facts.voices == ("0", "1", "2")
        slow = (await collected(engine.speak(request(text, speed=0.5, voice="1"))))[1]
        quick = (await collected(engine.speak(request(text, speed=2.0, voice="1"))))[1]
        assert slow.duration_s > 2 * quick.duration_s
        with pytest.raises(InvalidRequest, match="no voice '3'"):
            await collected(engine.speak(request(text, voice="3")))


@pytest.mark.parametrize("text", ["12 34", "日本", "😀"])
async def test_vits_refuses_what_it_has_no_letters_for(tmp_path: Path, text: str) -> None:
    async with opened(tiny_vits(tmp_path)) as engine:
        with pytest.raises(InvalidRequest, match="nothing"):
            await collected(engine.speak(request(text)))


async def test_a_vits_that_reads_phonemes_gets_them(tmp_path: Path) -> None:
    path = tiny_vits(tmp_path)
    config = path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"phonemize": True}), encoding="utf-8")
    async with opened(path) as engine:
        # "fˈoʊni": of these letters the tiny model knows f, o, n and i, with blanks between them.
        _, finish = await collected(engine.speak(request("phony")))
        assert finish.num_symbols == 2 * 4 + 1


async def test_missing_weights_fail_the_load(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tiny_vits(tmp_path)
    tensors = load_file(path / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "decoder.conv_pre" not in n}, path / "model.safetensors")
    with pytest.raises(ModelLoadFailed, match="lack"):
        await open_speaking_engine(spec(path), lambda *_: None)


async def test_a_family_that_is_not_served_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bark"}), encoding="utf-8")
    with pytest.raises(ModelLoadFailed, match=r"'bark'.*piper, vits"):
        await open_speaking_engine(spec(tmp_path), lambda *_: None)


async def test_models_that_speak_do_nothing_else(tmp_path: Path) -> None:
    async with opened(tiny_piper(tmp_path)) as engine:
        with pytest.raises(InvalidRequest, match="does not write"):
            async for _ in engine.generate(GenerationRequest(TextPrompt("a"))):
                pass
        with pytest.raises(InvalidRequest):
            await engine.tokenize(TextPrompt("a"))
        with pytest.raises(UnsupportedParameter) as caught:
            await collected(engine.speak(request(instructions="Whisper.")))
        assert caught.value.param == "instructions"
        with pytest.raises(InvalidRequest, match="4096"):
            await collected(engine.speak(request("a" * 5000)))
