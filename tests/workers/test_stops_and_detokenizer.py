"""Stop strings and incremental detokenization: pure, so every split of every text is tried."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.text.detokenizer import Detokenizer
from workers.text.stops import StopMatcher


def feed(matcher: StopMatcher, pieces: Sequence[str]) -> str:
    sent = ""
    for piece in pieces:
        sent += matcher.push(piece)
        if matcher.matched is not None:
            return sent
    return sent + matcher.flush()


@given(
    st.text("ab.", max_size=30),
    st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 30)),
)
def test_a_stop_string_is_found_and_trimmed_however_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    matcher = StopMatcher(tuple(stops))
    sent = feed(matcher, pieces)
    if matcher.matched is None:
        assert sent == text
        assert not any(stop in text for stop in stops)
    else:
        assert text.startswith(sent + matcher.matched)
        assert not any(stop in sent for stop in stops)


def test_text_that_only_begins_like_a_stop_string_is_sent_in_the_end() -> None:
    matcher = StopMatcher(("STOP",))
    assert matcher.push("go ST") == "go "
    assert matcher.push("ILL") == "STILL"
    assert matcher.push(" ST") == " "
    assert matcher.flush() == "ST"


@given(st.text(max_size=40))
def test_bytes_become_whole_characters_and_nothing_is_lost(text: str) -> None:
    def decode(ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.push(byte) for byte in text.encode()]
    assert "".join(pieces) + detokenizer.flush() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_at_the_end_shows_as_replacement() -> None:
    detokenizer = Detokenizer(lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    assert detokenizer.push(0xE6) == ""
    assert detokenizer.flush() == "\ufffd"


@pytest.mark.parametrize("stop", ["x" * 1_000_000])
def test_an_enormous_stop_string_costs_nothing_much(stop: str) -> None:
    matcher = StopMatcher((stop,))
    assert matcher.push("abc") + matcher.flush() == "abc"
