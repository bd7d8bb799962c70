"""One request inside the text engine: its tokens, its place in the cache, its reply so far.

Owned by the engine's thread, except `cancelled`, which any thread may set.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from workers.engine import GenerationRequest, TextDelta, TokenLogprob
from workers.text.detokenizer import Decode, Detokenizer
from workers.text.embeddings import EmbeddingSpan, RopePositions
from workers.text.kv_cache import PrefixHashes
from workers.text.lookup import Lookup
from workers.text.sampler import History, RowSampling
from workers.text.stops import StopMatcher


@dataclass(slots=True, eq=False)
class Sequence:
    """A request and its state.

    Attributes:
        token_ids: prompt then generated ids.
        num_prompt_tokens: length of the prompt part.
        num_computed_tokens: leading tokens whose keys and values are in the cache.
        max_tokens: most tokens to generate.
        hashes: of its full blocks, for the prefix cache.
        blocks: cache blocks that it holds; none while waiting.
        num_cached_tokens: prompt tokens that were found in the cache and not computed.
        draft: guessed next tokens, to be checked by the next step.
        lookup: where guesses come from; None for none.
        finish_reason: set once, ends the sequence.
        embeddings: what replaces token embeddings in the prompt.
        rope: rotary positions, where they are not the tokens' own.
    """

    request: GenerationRequest
    sampling: RowSampling
    token_ids: list[int]
    num_prompt_tokens: int
    max_tokens: int
    decode: Decode
    serial: int = 0
    hashes: PrefixHashes = field(default_factory=PrefixHashes)
    blocks: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    draft: tuple[int, ...] = ()
    lookup: Lookup | None = None
    num_computed_tokens: int = 0
    cancelled: bool = False
    finish_reason: str | None = None
    embeddings: tuple[EmbeddingSpan, ...] = ()
    rope: RopePositions | None = None
    arrived_s: float = field(default_factory=time.monotonic)
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    generated: Counter[int] = field(default_factory=Counter)
    _detokenizer: Detokenizer = field(init=False, repr=False)
    _stops: StopMatcher = field(init=False, repr=False)
    _pending_logprobs: list[TokenLogprob] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._detokenizer = Detokenizer(self.decode)
        self._stops = StopMatcher(self.request.stop)

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.token_ids)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether all but the newest token are in the cache, so that one step yields one token."""
        return self.num_computed_tokens == len(self.token_ids) - 1 and self.num_generated_tokens > 0

    @property
    def history(self) -> History:
        """What penalties look at."""
        return History(self.token_ids[: self.num_prompt_tokens], self.generated)

    @property
    def stop(self) -> str:
        """The stop string that ended the reply, or empty."""
        return self._stops.matched or ""

    def accept(self, token_id: int, *, is_eos: bool, logprob: TokenLogprob | None) -> TextDelta | None:
        """Append one generated token; decide whether the reply ends; return the new text, if there is any."""
        self.token_ids.append(token_id)
        self.generated[token_id] += 1
        if logprob is not None:
            self._pending_logprobs.append(logprob)
        if is_eos:
            self.finish_reason = "stop"
            return self._delta(self._tail())
        text = self._stops.push(self._detokenizer.push(token_id))
        if self._stops.matched is not None:
            self.finish_reason = "stop"
        elif self.num_generated_tokens >= self.max_tokens:
            self.finish_reason = "length"
            text += self._tail()
        return self._delta(text)

    def guess(self, drafted: tuple[int, ...], num_right: int, *, allowed: bool) -> None:
        """Learn how the last draft fared and make the next one, if there may be one."""
        if self.lookup is not None:
            self.lookup.learn(len(drafted), num_right)
            self.draft = self.lookup.guess()[: self.max_tokens - self.num_generated_tokens - 1] if allowed else ()

    def _tail(self) -> str:
        """Text still held back when the reply ends."""
        text = self._stops.push(self._detokenizer.flush())
        return text if self._stops.matched is not None else text + self._stops.flush()

    def _delta(self, text: str) -> TextDelta | None:
        if not text and not (self._pending_logprobs and self.finish_reason):
            return None
        delta = TextDelta(text, tuple(self._pending_logprobs))
        self._pending_logprobs.clear()
        return delta
