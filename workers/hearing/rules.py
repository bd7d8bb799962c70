"""Which token may come next, and which one is taken. Above: `decoding.py`. Tensors in, ids out; no model, no state.

The rules of times are those of Whisper's own decoding (github.com/openai/whisper, `decoding.py`, MIT): times come in
pairs and never go back, a window begins with one, and whenever all times together are likelier than the likeliest word,
a time it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workers.hearing.vocabulary import Vocabulary

_NEVER = float("-inf")


class Rules:
    """The masks of one model, on its device."""

    def __init__(self, vocabulary: Vocabulary, device: torch.device) -> None:
        self._vocabulary = vocabulary
        never = torch.zeros(vocabulary.size, device=device)
        unwanted = [*vocabulary.suppressed, vocabulary.start, vocabulary.previous, vocabulary.no_times]
        never[torch.tensor(unwanted, device=device)] = _NEVER
        # Between the end of text and the times lie languages, tasks and other control tokens.
        never[vocabulary.end + 1 : vocabulary.first_time] = _NEVER
        self._never = never
        self._first = torch.tensor([*vocabulary.suppressed_first], dtype=torch.long, device=device)

    def apply(self, logits: torch.Tensor, said: Sequence[Sequence[int]], times: Sequence[bool]) -> None:
        """Mask what may not come next, in place.

        Args:
            logits: (rows, vocabulary) float32.
            said: what each row has said so far.
            times: whether each row tells times.
        """
        first_time = self._vocabulary.first_time
        logits += self._never
        telling = [row for row, tells in enumerate(times) if tells]
        if not telling:
            logits[:, first_time:] = _NEVER
        for row, (tokens, tells) in enumerate(zip(said, times, strict=True)):
            if not tokens and self._first.numel():
                logits[row, self._first] = _NEVER
            if tells:
                self._mask_times(logits[row], tokens)
            elif telling:
                logits[row, first_time:] = _NEVER
        if telling:
            chosen = logits if len(telling) == len(logits) else logits[telling]
            all_times = chosen[:, first_time:].logsumexp(dim=1)
            likeliest_word = chosen[:, :first_time].amax(dim=1)
            for row, forced in zip(telling, (all_times > likeliest_word).tolist(), strict=True):
                if forced:
                    logits[row, :first_time] = _NEVER

    def _mask_times(self, logits: torch.Tensor, tokens: Sequence[int]) -> None:
        vocabulary = self._vocabulary
        first = vocabulary.first_time
        if not tokens:
            logits[:first] = _NEVER
            logits[first + vocabulary.max_initial_step + 1 :] = _NEVER
            return
        last_is_time = tokens[-1] >= first
        if last_is_time:
            if len(tokens) < 2 or tokens[-2] >= first:
                logits[first:] = _NEVER
            else:
                logits[: vocabulary.end] = _NEVER
        latest = next((token for token in reversed(tokens) if token >= first), None)
        if latest is not None:
            # The end of a stretch may be said again as the next one's beginning; else time goes on.
            opens = last_is_time and len(tokens) > 1 and tokens[-2] < first
            logits[first : latest if opens else latest + 1] = _NEVER


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token and its natural-log probability under the masked distribution at temperature 1."""

    token: int
    logprob: float


def choose(
    logits: torch.Tensor,
    temperatures: Sequence[float],
    generators: Sequence[torch.Generator | None],
    count: int = 1,
) -> list[list[Choice]]:
    """Return tokens for each row of masked logits (rows, vocabulary).

    At temperature 0 these are the `count` likeliest, the likeliest first; else one that is drawn.
    """
    tokens = logits.argmax(dim=1, keepdim=True) if count == 1 else logits.topk(count, dim=1).indices
    for row, temperature in enumerate(temperatures):
        if temperature > 0:
            chances = torch.softmax(logits[row] / temperature, dim=0)
            tokens[row, 0] = torch.multinomial(chances, 1, generator=generators[row])[0]
    # torch's logsumexp takes ten times as long.
    logprobs = logits.log_softmax(dim=1).gather(1, tokens)
    return [
        [Choice(token, logprob) for token, logprob in zip(*found, strict=True)][: 1 if temperature > 0 else count]
        for *found, temperature in zip(tokens.tolist(), logprobs.tolist(), temperatures, strict=True)
    ]
