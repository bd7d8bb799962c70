"""Which ways to write a window down are followed. Pure: ids and logprobs in, ids out. Above: `decoding.py`.

The search is that of Whisper's own decoding (github.com/openai/whisper, `decoding.py`, MIT) with patience 1: of what
all beams could say next the likeliest go on, those that end are put aside, and once as many have ended as there are
beams, the one with the likeliest tokens on average counts. With one beam it is the greedy choice, or the draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from workers.hearing.rules import Choice

_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class Beam:
    """One way to write a window down: its tokens so far, the end perhaps among them, their logprobs, and the sum."""

    said: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    total: float = 0.0

    def after(self, choice: Choice) -> Beam:
        """Return the beam with one more token."""
        return Beam((*self.said, choice.token), (*self.logprobs, choice.logprob), self.total + choice.logprob)


@dataclass(frozen=True, slots=True)
class Search:
    """Where a window's search stands.

    Attributes:
        beams: those that go on, all of one length; at first one that has said nothing.
        ended: those that have said the end, in the order in which they did, the likeliest of a step first.
    """

    beams: tuple[Beam, ...] = (Beam(),)
    ended: tuple[Beam, ...] = ()

    @property
    def num_said(self) -> int:
        """How many tokens each beam that goes on has said."""
        return len(self.beams[0].said) if self.beams else 0

    def is_over(self, width: int) -> bool:
        """Return whether `width` beams have ended, or none is left."""
        return len(self.ended) >= width or not self.beams

    def best(self, width: int, end: int) -> Beam:
        """Return the beam with the highest logprob per token, the end not counted as one.

        Where fewer than `width` have ended, the likeliest of the others count as if they had.
        """
        others = sorted(self.beams, key=lambda beam: beam.total, reverse=True)[: max(0, width - len(self.ended))]

        def mean(beam: Beam) -> float:
            return beam.total / max(1, len(beam.said) - (beam.said[-1:] == (end,)))

        return max((*self.ended, *others), key=mean, default=Beam())


def advance(
    search: Search, choices: Sequence[Sequence[Choice]], width: int, end: int
) -> tuple[Search, tuple[int, ...]]:
    """Let a window's beams say one more token.

    Args:
        search: where it stands.
        choices: what each of its beams may say next. Of K beams the K + 1 likeliest tokens each are enough: one of them
            at most is the end. What is impossible (logprob -inf) is left out.
        width: most beams that go on, and that end.
        end: the token that ends a beam.

    Returns:
        where it stands now, and which of the beams before each of the new ones comes from. The first that comes from a
        beam takes its place, if there is one, so that few beams' keys and values need to be copied.
    """
    candidates = [
        (beam.total + choice.logprob, parent, choice)
        for parent, (beam, likeliest) in enumerate(zip(search.beams, choices, strict=True))
        for choice in likeliest
        if choice.logprob > _NEVER
    ]
    candidates.sort(key=lambda candidate: candidate[0], reverse=True)
    ended = list(search.ended)
    going: list[tuple[int, Choice]] = []
    for _, parent, choice in candidates:
        if len(going) == width:
            break
        if choice.token != end:
            going.append((parent, choice))
        elif len(ended) < width:
            ended.append(search.beams[parent].after(choice))
    placed = _placed(going)
    beams = tuple(search.beams[parent].after(choice) for parent, choice in placed)
    return Search(beams, tuple(ended)), tuple(parent for parent, _ in placed)


def _placed(going: Sequence[tuple[int, Choice]]) -> list[tuple[int, Choice]]:
    places: dict[int, tuple[int, Choice]] = {}
    others = []
    for parent, choice in going:
        if parent < len(going) and parent not in places:
            places[parent] = (parent, choice)
        else:
            others.append((parent, choice))
    free = (place for place in range(len(going)) if place not in places)
    places |= dict(zip(free, others, strict=True))
    return [places[place] for place in range(len(going))]


def moves(before: Search, parents: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (beam, new place, number of tokens that are the same in both places) for each beam that is not in place."""
    for place, parent in enumerate(parents):
        if place != parent:
            old = before.beams[place].said if place < len(before.beams) else ()
            yield parent, place, _num_same(old, before.beams[parent].said)


def _num_same(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
