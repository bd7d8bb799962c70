"""The pure parts of speaking: where texts are cut, whose turn it is, which voice is meant, how sound is encoded."""

from __future__ import annotations

import numpy as np
import pytest
from hostler.errors import InvalidRequest, UnsupportedParameter
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.sounds import decoded, pitch_hz
from workers.speaking.encoding import FORMATS, AudioEncoder
from workers.speaking.sentences import MAX_FIRST_CHARACTERS, MAX_PIECE_CHARACTERS, cut
from workers.speaking.turns import Turn, next_turn, start_s
from workers.speaking.voices import OPENAI_VOICES, choose_voice

# ---------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("He paid $3.50 at 5.30 p.m. and left.", ["He paid $3.50 at 5.30 p.m. and left."]),
        ("Dr. Smith met Mrs. Jones. They spoke.", ["Dr. Smith met Mrs. Jones.", "They spoke."]),
        ("J. R. R. Tolkien wrote it.", ["J. R. R. Tolkien wrote it."]),
        ('She said "Go!" Then she went.', ['She said "Go!"', "Then she went."]),
        ("Wait... what? Really?!  Yes.", ["Wait... what?", "Really?!", "Yes."]),
        ("A title\n\nA line\nAnother", ["A title", "A line", "Another"]),
        ("今日は。元気ですか？はい", ["今日は。", "元気ですか？", "はい"]),
        ("no end", ["no end"]),
        ("a\x00b\x07.", ["ab."]),
        (" \n\t ", []),
        ("", []),
    ],
)
def test_a_text_is_cut_where_a_reader_would_pause(text: str, pieces: list[str]) -> None:
    assert cut(text) == pieces


def test_a_long_first_sentence_is_cut_at_a_comma_so_that_sound_comes_soon() -> None:
    text = "This is the beginning of it, " + "and it goes on and on, " * 9 + "until it ends. And then more, much more."
    first, *rest = cut(text)
    assert first.endswith(",")
    assert len(first) <= MAX_FIRST_CHARACTERS
    assert rest[-1] == "And then more, much more."


@given(st.text(max_size=2000) | st.text(alphabet="ab .,!?\n。", max_size=3000))
def test_nothing_is_lost_and_nothing_is_too_long(text: str) -> None:
    pieces = cut(text)
    assert all(0 < len(piece) <= MAX_PIECE_CHARACTERS for piece in pieces)
    kept = [c for c in "".join(pieces) if not c.isspace()]
    letters = [c for c in text if c.isalnum()]
    assert [c for c in kept if c.isalnum()] == letters


def test_a_text_without_any_pause_is_cut_all_the_same() -> None:
    assert [len(piece) for piece in cut("x" * 700)] == [300, 300, 100]


# ---------------------------------------------------------------- turns


def test_a_newcomer_is_next_and_then_all_advance_alike() -> None:
    old = [Turn(1, 30.0), Turn(2, 31.0)]
    newcomer = Turn(3, start_s(old))
    assert newcomer.made_s == 30.0
    assert next_turn([*old, newcomer], 16) == old[0]
    assert next_turn([Turn(1, 33.0), old[1], newcomer], 16) == newcomer


def test_no_flood_of_newcomers_starves_the_first() -> None:
    jobs, served = {0: 0.0}, 0
    for arrival in range(1, 50):
        jobs[arrival] = start_s([Turn(a, s) for a, s in jobs.items()])
        chosen = next_turn([Turn(a, s) for a, s in jobs.items()], 1000)
        assert chosen is not None
        jobs[chosen.arrival] += 3.0
        served += chosen.arrival == 0
    assert served >= 1
    assert jobs[0] - min(jobs.values()) <= 3.0


def test_who_reads_slowly_waits_and_who_came_too_late_too() -> None:
    full, other = Turn(1, 0.0, is_full=True), Turn(2, 5.0)
    assert next_turn([full, other], 16) == other
    assert next_turn([full, other], 1) is None
    assert next_turn([], 16) is None


# ---------------------------------------------------------------- voices


def test_a_model_with_one_voice_answers_to_openais_names() -> None:
    for name in (*OPENAI_VOICES, "Alloy", "", "default", "joe", "JOE"):
        assert choose_voice(["joe"], name) == 0
    with pytest.raises(InvalidRequest, match="joe") as caught:
        choose_voice(["joe"], "bob")
    assert caught.value.param == "voice"


def test_a_model_with_several_voices_answers_to_its_own_names_only() -> None:
    voices = ["amy", "alloy", "bob"]
    assert [choose_voice(voices, name) for name in ("alloy", "Bob", "", "default")] == [1, 2, 0, 0]
    with pytest.raises(InvalidRequest, match="amy, alloy, bob"):
        choose_voice(voices, "nova")
    with pytest.raises(InvalidRequest, match="and 69 more"):
        choose_voice([str(n) for n in range(109)], "nova")


# ---------------------------------------------------------------- encoding


def tone(seconds: float, rate_hz: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate_hz)) / rate_hz)).astype(np.float32)


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_comes_back_with_its_pitch_and_its_length(format: str) -> None:
    encoder = AudioEncoder(format, 22_050)
    parts = [encoder.encode(tone(1.0, 22_050)) for _ in range(3)]
    assert all(parts), "sound comes out while it goes in"
    samples, rate_hz = decoded(b"".join(parts) + encoder.finish(), format)
    # Opus is always decoded at 48 kHz; mp3 and aac pad to whole frames.
    assert rate_hz == (48_000 if format == "opus" else 24_000)
    assert len(samples) / rate_hz == pytest.approx(3.0, abs=0.1)
    assert pitch_hz(samples, rate_hz) == pytest.approx(440, abs=1)
    assert 0.4 < np.abs(samples[rate_hz // 2 : -rate_hz // 2]).max() < 0.6


def test_a_wav_begins_with_44_bytes_whose_sizes_are_left_open() -> None:
    encoder = AudioEncoder("wav", 24_000)
    data = encoder.encode(tone(0.1, 24_000)) + encoder.finish()
    assert (data[:4], data[4:8], data[36:40], data[40:44]) == (b"RIFF", b"\xff" * 4, b"data", b"\xff" * 4)
    assert len(data) == 44 + 2 * 2400


def test_pcm_is_16_bits_at_24_khz_and_nothing_else() -> None:
    encoder = AudioEncoder("pcm", 16_000)
    data = encoder.encode(tone(1.0, 16_000)) + encoder.finish()
    assert len(data) == pytest.approx(2 * 24_000, abs=100)


def test_what_is_too_loud_is_cut_and_does_not_wrap_around() -> None:
    encoder = AudioEncoder("pcm", 24_000)
    data = encoder.encode(np.full(2400, 1.5, np.float32)) + encoder.finish()
    assert np.frombuffer(data, "<i2").min() > 32_000


def test_a_format_that_is_not_made_here_is_named() -> None:
    with pytest.raises(UnsupportedParameter, match="'midi'"):
        AudioEncoder("midi", 24_000)
