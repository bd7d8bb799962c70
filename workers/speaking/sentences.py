"""Cuts a text into pieces that are spoken one after the other. Pure.

Above: the engine. A piece is what a request does in one turn: it bounds the time until the first sound, until the next
request's turn, and until a request that was given up stops. Cuts are made where a reader would pause.
"""

from __future__ import annotations

import re
import unicodedata

MAX_PIECE_CHARACTERS = 300
"""No piece is longer, whatever the text."""
MAX_FIRST_CHARACTERS = 120
"""The first piece ends at a comma or the like before this, if its sentence is longer: somebody waits for it."""
_MIN_FIRST_CHARACTERS = 20

# A sentence's end: a mark, what closes with it, and a space. Marks of scripts without spaces need none.
_END = re.compile(r"""[.!?…]+["')\]»”’]*\s+|[。！？｡]+[」』）”’]*\s*|[؟।॥۔]+\s+""")
_PAUSE = re.compile(r"""[,;:–—]["')\]»”’]*\s|[、，；：،؛]""")
_LINES = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+\s*")
# They end with a full stop, but no sentence. A single letter is an initial.
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[\"'])(?:[^\W\d_]|mr|mrs|ms|dr|prof|sr|jr|st|vs|no|e\.g|i\.e|cf|fig|approx|dept|bzw|z\.b|d\.h|ca|nr|mme|"
    r"mlle|sra|dra)\.$",
    re.IGNORECASE,
)


def cut(text: str) -> list[str]:
    """Return the pieces of a text in order, none of them blank, each of at most `MAX_PIECE_CHARACTERS`.

    Nothing is lost but blanks between them and control characters.
    """
    pieces: list[str] = []
    for line in _LINES.split(_cleaned(text)):
        for sentence in _sentences(line):
            if not pieces and len(sentence) > MAX_FIRST_CHARACTERS:
                at = _last_pause(sentence, MAX_FIRST_CHARACTERS)
                if at >= _MIN_FIRST_CHARACTERS:
                    pieces.append(sentence[:at].strip())
                    sentence = sentence[at:].strip()
            pieces += _short_enough(sentence)
    return [piece for piece in pieces if piece]


def _cleaned(text: str) -> str:
    """Without characters that no voice can say and that C libraries stumble over; line ends stay."""
    return "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs", "Co", "Cn"))


def _sentences(line: str) -> list[str]:
    found, begin = [], 0
    for end in _END.finditer(line):
        following = line[end.end() : end.end() + 1]
        if following.islower() or _ABBREVIATION.search(line[max(begin, end.start() - 12) : end.end()].rstrip()):
            continue
        found.append(line[begin : end.end()].strip())
        begin = end.end()
    found.append(line[begin:].strip())
    return found


def _short_enough(sentence: str) -> list[str]:
    pieces = []
    while len(sentence) > MAX_PIECE_CHARACTERS:
        at = _last_pause(sentence, MAX_PIECE_CHARACTERS)
        if at < MAX_PIECE_CHARACTERS // 3:
            at = sentence.rfind(" ", 1, MAX_PIECE_CHARACTERS) + 1 or MAX_PIECE_CHARACTERS
        pieces.append(sentence[:at].strip())
        sentence = sentence[at:].strip()
    return [*pieces, sentence]


def _last_pause(sentence: str, limit: int) -> int:
    """Return where the last pause that begins before `limit` ends; 0 without one."""
    ends = [match.end() for match in _PAUSE.finditer(sentence[:limit])]
    return ends[-1] if ends else 0
