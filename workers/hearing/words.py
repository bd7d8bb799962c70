"""When each word of a window was spoken, from what the decoder listened to. Pure; above: `engine.py`.

After Whisper's own `timing.py` (github.com/openai/whisper, MIT): some heads of the decoder listen to where the word is
that they are about to write; the cheapest monotonic path through what they listen to gives each token a time.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

SOUND_S = 0.02
"""One position of the encoder."""

_MEDIAN_WIDTH = 7
_NO_SPACES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})
_BEFORE = "\"'“¿([{-"
_AFTER = "\"'.。,，!！?？:：”)]}、"
_REPLACEMENT = "\ufffd"

Matrix = npt.NDArray[np.float32]


def path_of(costs: Matrix) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the cheapest path from the first to the last cell of (tokens, sounds): its rows and its columns.

    Steps go one token on, one sound on, or both (dynamic time warping). Computed along anti-diagonals.
    """
    num_rows, num_columns = costs.shape
    total = np.full((num_rows + 1, num_columns + 1), np.inf, np.float32)
    total[0, 0] = 0.0
    came = np.zeros((num_rows + 1, num_columns + 1), np.int8)
    for diagonal in range(2, num_rows + num_columns + 1):
        rows = np.arange(max(1, diagonal - num_columns), min(num_rows, diagonal - 1) + 1)
        columns = diagonal - rows
        options = np.stack((total[rows - 1, columns - 1], total[rows - 1, columns], total[rows, columns - 1]))
        best = options.argmin(axis=0)
        total[rows, columns] = costs[rows - 1, columns - 1] + options[best, np.arange(len(rows))]
        came[rows, columns] = best
    row, column = num_rows, num_columns
    rows_of, columns_of = [], []
    while row > 0 and column > 0:
        rows_of.append(row - 1)
        columns_of.append(column - 1)
        step = came[row, column]
        row, column = row - int(step != 2), column - int(step != 1)
    return np.array(rows_of[::-1]), np.array(columns_of[::-1])


def token_starts_s(attention: torch.Tensor, num_before: int) -> list[float]:
    """Return when each token of a text begins and, last, when it ends.

    Args:
        attention: (heads, tokens, sounds), rows sum to 1. Each row is what was listened to for the token after it: the
            rows of the opening, the text and its end.
        num_before: rows before the one that the text's first token follows.
    """
    deviation, mean = torch.std_mean(attention, dim=1, keepdim=True, correction=0)
    scores = (attention - mean) / deviation.clamp_min(1e-9)
    width = _MEDIAN_WIDTH if scores.shape[-1] > _MEDIAN_WIDTH // 2 else 1
    padded = torch.nn.functional.pad(scores, (width // 2, width // 2), mode="reflect")
    smooth = padded.unfold(-1, width, 1).median(dim=-1).values
    tokens, sounds = path_of(-smooth[:, num_before:-1].mean(dim=0).cpu().numpy().astype(np.float32))
    first = np.flatnonzero(np.diff(tokens, prepend=-1))
    return [float(sound) * SOUND_S for sound in sounds[first]]


def split_words(tokens: Sequence[int], text_of: Callable[[Sequence[int]], str], language: str) -> list[tuple[str, int]]:
    """Return a text's words with their spaces and punctuation, and how many tokens each has."""
    pieces: list[tuple[str, int]] = []
    held: list[int] = []
    for token in tokens:
        held.append(token)
        text = text_of(held)
        if _REPLACEMENT not in text:
            pieces.append((text, len(held)))
            held = []
    if held:
        pieces.append((text_of(held), len(held)))
    if language not in _NO_SPACES:
        pieces = _joined(pieces, lambda text: not text.startswith(" ") and text.strip() not in string.punctuation)
    return _with_punctuation(pieces)


def _joined(pieces: list[tuple[str, int]], continues: Callable[[str], bool]) -> list[tuple[str, int]]:
    words: list[tuple[str, int]] = []
    for text, count in pieces:
        if words and continues(text):
            words[-1] = (words[-1][0] + text, words[-1][1] + count)
        else:
            words.append((text, count))
    return words


def _with_punctuation(words: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Give opening marks to the word after them, closing ones to the word before."""
    merged: list[tuple[str, int]] = []
    pending: tuple[str, int] = ("", 0)
    for text, count in words:
        mark = text.strip()
        if mark and mark in _BEFORE and (text.startswith(" ") or not merged):
            pending = (pending[0] + text, pending[1] + count)
        elif mark and mark in _AFTER and merged and not pending[1]:
            merged[-1] = (merged[-1][0] + text, merged[-1][1] + count)
        else:
            glued = pending[0] + (text.lstrip() if pending[1] else text)
            merged.append((glued, pending[1] + count))
            pending = ("", 0)
    if pending[1]:
        merged.append(pending)
    return merged
