"""The decode loop: rows that join, say one token each step, and leave. Above: `listening.py`; below: `whisper.py`.

A row is one window of one recording. It joins with what the encoder made of it, finds out its language if nobody said
which, and is opened anew at a higher temperature when what it said looks wrong. At temperature 0 it follows all its
beams (`beams.py`); above it draws once, and the places of the other beams idle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from hostler.errors import Internal

from workers.hearing.beams import Search, advance, moves
from workers.hearing.rules import Rules, choose
from workers.hearing.times import MAX_COMPRESSION_RATIO, TEMPERATURES, Decoded
from workers.hearing.vocabulary import Vocabulary
from workers.hearing.whisper import Whisper

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wanted:
    """How a window is to be written down.

    Attributes:
        language: a code; empty: find out.
        prompt: token ids of the text before.
        temperature: None: the likeliest, then warmer while it looks wrong.
        times: tell when.
        seed: of the draws at temperatures above 0.
    """

    language: str = ""
    translate: bool = False
    prompt: tuple[int, ...] = ()
    temperature: float | None = None
    times: bool = True
    seed: int = 0


@dataclass(eq=False, slots=True)
class Row(Generic[T]):
    """A window on its way. `item` is the caller's."""

    item: T
    wanted: Wanted
    language: str
    temperature: float
    opening: list[int] = field(default_factory=list)
    search: Search = field(default_factory=Search)
    no_speech_prob: float = 0.0
    generator: torch.Generator | None = None
    tries: list[Decoded] = field(default_factory=list)
    failure: Internal | None = None


class Decoding(Generic[T]):
    """All rows of one model. For one thread.

    Args:
        whisper: the model.
        vocabulary: its tokens.
        text_of: token ids → text, without control tokens and times.
    """

    def __init__(self, whisper: Whisper, vocabulary: Vocabulary, text_of: Callable[[Sequence[int]], str]) -> None:
        self._whisper = whisper
        self.vocabulary = vocabulary
        self._text_of = text_of
        self._rules = Rules(vocabulary, whisper.device)
        self.rows: list[Row[T]] = []

    def join(self, items: Sequence[tuple[T, Wanted]], states: torch.Tensor) -> list[Row[T]]:
        """Add windows; states (windows, num_sounds, width) is what the encoder made of them.

        Returns:
            their rows, whose language is known now.
        """
        first = len(self.rows)
        joined = []
        for offset, ((item, wanted), heard) in enumerate(zip(items, states, strict=True)):
            self._whisper.hear(first + offset, heard)
            joined.append(Row(item, wanted, wanted.language, wanted.temperature or 0.0))
        self.rows += joined
        if self.vocabulary.is_multilingual:
            for index in range(first, len(self.rows)):
                if not self.rows[index].language:
                    self.rows[index].language = self._language(index)
        self._open(range(first, len(self.rows)))
        return joined

    def _language(self, index: int) -> str:
        codes = list(self.vocabulary.languages)
        logits = self._whisper.begin(index, [[self.vocabulary.start]], [0])[0, 0]
        tokens = torch.tensor([self.vocabulary.languages[code] for code in codes], device=logits.device)
        return codes[int(logits[tokens].argmax())]

    def _open(self, indices: Sequence[int]) -> None:
        """Read rows' openings and take their first tokens; neighbours with openings of one length together."""
        group: list[int] = []
        for index in indices:
            row = self.rows[index]
            wanted = row.wanted
            row.opening = self.vocabulary.opening(
                row.language, translate=wanted.translate, times=wanted.times, prompt=list(wanted.prompt)
            )
            row.search = Search()
            row.generator = self._generator(row) if row.temperature > 0 else None
            if group and (index != group[-1] + 1 or len(row.opening) != len(self.rows[group[-1]].opening)):
                self._begin(group)
                group = []
            group.append(index)
        if group:
            self._begin(group)

    def _generator(self, row: Row[T]) -> torch.Generator:
        generator = torch.Generator(self._whisper.device)
        return generator.manual_seed(1000 * row.wanted.seed + round(100 * row.temperature))

    def _begin(self, group: list[int]) -> None:
        rows = [self.rows[index] for index in group]
        openings = [row.opening for row in rows]
        start = openings[0].index(self.vocabulary.start)
        logits = self._whisper.begin(group[0], openings, [start, -1])
        if self.vocabulary.no_speech is not None:
            chances = torch.softmax(logits[:, 0], dim=-1)[:, self.vocabulary.no_speech].tolist()
            for row, chance in zip(rows, chances, strict=True):
                row.no_speech_prob = chance
        self._take(rows, logits[:, 1])

    def step(self) -> list[Row[T]]:
        """Let every row say one token; return the rows that have come to their end, the last of whose `tries` counts.

        They stay until `leave`.
        """
        running = [row for row in self.rows if not self._is_over(row)]
        if running == self.rows and running:
            self._take(running, self._read(running))
        over = [index for index, row in enumerate(self.rows) if self._is_over(row)]
        again = [index for index in over if self._judge(self.rows[index])]
        self._open(again)
        return [self.rows[index] for index in over if index not in again]

    def leave(self, rows: Sequence[Row[T]]) -> None:
        """Take rows out; the last ones move into the gaps."""
        for row in rows:
            if row not in self.rows:
                continue
            index, last = self.rows.index(row), len(self.rows) - 1
            if index != last:
                self._whisper.move(last, index)
                self.rows[index] = self.rows[last]
            self.rows.pop()

    def _read(self, rows: Sequence[Row[T]]) -> torch.Tensor:
        """Read what all rows' beams have said last; return (beams, vocabulary) logits of those that go on."""
        tokens: list[int] = []
        used: list[int] = []
        for row in rows:
            last = [beam.said[-1] for beam in row.search.beams]
            used += range(len(tokens), len(tokens) + len(last))
            tokens += last + [last[0]] * (self._whisper.num_beams - len(last))
        logits = self._whisper.step(tokens, [len(row.opening) + row.search.num_said - 1 for row in rows])
        return logits if len(used) == len(tokens) else logits[used]

    def _take(self, rows: Sequence[Row[T]], logits: torch.Tensor) -> None:
        """Choose the next tokens of the rows' beams by their logits (beams, vocabulary)."""
        owners = [row for row in rows for _ in row.search.beams]
        # A sum is finite where all are.
        for index, sound in enumerate(logits.sum(dim=1).isfinite().tolist()):
            if not sound:
                owners[index].failure = Internal("The model produced no valid numbers for this recording.")
                logits[index] = 0.0
        said = [beam.said for row in rows for beam in row.search.beams]
        self._rules.apply(logits, said, [row.wanted.times for row in owners])
        width = self._whisper.num_beams
        choices = choose(
            logits,
            [row.temperature for row in owners],
            [row.generator for row in owners],
            count=width + 1 if width > 1 else 1,
        )
        copies: list[tuple[int, int, int, int]] = []
        place = 0
        for row in rows:
            before, first = row.search, len(row.opening)
            found = choices[place : place + len(before.beams)]
            place += len(before.beams)
            row.search, parents = advance(before, found, self._width(row), self.vocabulary.end)
            slot = self.rows.index(row) * width
            copies += [
                (slot + source, slot + target, first + same, first + before.num_said)
                for source, target, same in moves(before, parents)
            ]
        if copies:
            sources, targets, firsts, lasts = zip(*copies, strict=True)
            self._whisper.copy(sources, targets, min(firsts), max(lasts))

    def _width(self, row: Row[T]) -> int:
        return 1 if row.temperature > 0 else self._whisper.num_beams

    def _is_over(self, row: Row[T]) -> bool:
        room = self._whisper.shape.num_tokens
        most = min(room // 2, room - len(row.opening))
        return row.search.is_over(self._width(row)) or row.search.num_said >= most or row.failure is not None

    def _judge(self, row: Row[T]) -> bool:
        """Add what a row has said to its tries, and put the best one last; return whether to try again, warmer."""
        if row.failure is not None:
            return False
        best = row.search.best(self._width(row), self.vocabulary.end)
        tokens = best.said[:-1] if best.said[-1:] == (self.vocabulary.end,) else best.said
        words = [token for token in tokens if token < self.vocabulary.end]
        tried = Decoded(tokens, best.logprobs, self._text_of(words), row.temperature, row.no_speech_prob)
        row.tries.append(tried)
        if not tried.looks_wrong or row.wanted.temperature:
            return False
        following = [warmer for warmer in TEMPERATURES if warmer > row.temperature]
        if following:
            row.temperature = following[0]
            return True
        row.tries.sort(key=lambda one: (one.compression_ratio <= MAX_COMPRESSION_RATIO, one.avg_logprob))
        return False
