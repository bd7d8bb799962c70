"""One request inside the text engine: its tokens, its place in the cache, its reply so far.

Owned by the engine's thread, except `cancelled`, which any thread may set.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from workers.engine import Event, GenerationRequest, TextPrompt, TokenLogprob
from workers.text.detokenizer import Decode
from workers.text.embeddings import EmbeddingSpan, PromptExtras, RopePositions
from workers.text.kv_cache import PrefixHashes
from workers.text.lookup import Lookup
from workers.text.reply import Reply
from workers.text.reply_plan import ReplyPlan
from workers.text.sampler import History, RowSampling, row_rules


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
        embeddings: what replaces token embeddings in the prompt.
        rope: rotary positions, where they are not the tokens' own.
        adapter: which of the model's adapters it runs with; -1 for none.
        end_ids: tokens that end this reply, beside those that end any.
        prompt_logprobs: of the prompt's tokens so far, where they are asked for.
        num_scored_rows: rows of the prompt whose logits went into them.
        eligible_step: the scheduler's step in which it could first have run; 0 while there was no place for it.
        decoding_step: the first in which it decoded; 0 before.
        reply: turns tokens into events and knows when the reply is over.
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
    embeddings: tuple[EmbeddingSpan, ...] = ()
    rope: RopePositions | None = None
    adapter: int = -1
    end_ids: frozenset[int] = frozenset()
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    num_scored_rows: int = 0
    eligible_step: int = 0
    decoding_step: int = 0
    arrived_s: float = field(default_factory=time.monotonic)
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    generated: Counter[int] = field(default_factory=Counter)
    reply: Reply = None  # type: ignore[assignment]  # set below where the request asks for nothing special

    def __post_init__(self) -> None:
        if self.reply is None:
            self.reply = Reply(self.decode, max_tokens=self.max_tokens, stops=self.request.stop)

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
    def num_reusable_tokens(self) -> int:
        """Leading tokens that need not run if their keys and values are known.

        The last token must: its logits are wanted. So must those whose logits score the prompt and have not yet.
        """
        return min(self.num_tokens - 1, self.num_scored_rows if self.request.echo_logprobs else self.num_tokens)

    def scored_rows(self, start: int, end: int) -> range:
        """Return which of the tokens `start … end` give logits that score the prompt token after them."""
        if not self.request.echo_logprobs:
            return range(0)
        return range(max(start, self.num_scored_rows), min(end, self.num_prompt_tokens - 1))

    @property
    def history(self) -> History:
        """What penalties look at."""
        return History(self.token_ids[: self.num_prompt_tokens], self.generated)

    @property
    def finish_reason(self) -> str | None:
        """Why the reply ended; None while it goes on."""
        return self.reply.finish_reason

    @property
    def may_be_told_later(self) -> bool:
        """Whether nothing but text comes of the next token, and not the last, unless it is one that ends replies."""
        return self.reply.is_plain and self.num_generated_tokens + 1 < self.max_tokens

    def note(self, token_id: int) -> None:
        """Append one generated token."""
        self.token_ids.append(token_id)
        self.generated[token_id] += 1

    def accept(self, token_id: int, *, is_eos: bool, logprob: TokenLogprob | None) -> list[Event]:
        """Append one generated token; decide whether the reply ends; return what it brought."""
        self.note(token_id)
        return self.reply.accept(token_id, is_eos=is_eos, logprob=logprob)

    def guess(self, drafted: tuple[int, ...], num_right: int, *, allowed: bool) -> None:
        """Learn how the last draft fared and make the next one, if there may be one."""
        if self.lookup is not None:
            self.lookup.learn(len(drafted), num_right)
            self.draft = self.lookup.guess()[: self.max_tokens - self.num_generated_tokens - 1] if allowed else ()


def new_sequence(
    request: GenerationRequest,
    ids: list[int],
    extras: PromptExtras,
    plan: ReplyPlan,
    *,
    serial: int,
    room: int,
    defaults: dict[str, float],
    adapters: tuple[str, ...],
    fill_ends: frozenset[int],
) -> Sequence:
    """Return a request's sequence.

    Args:
        request: what was asked.
        ids, extras: its prompt.
        plan: its reply.
        serial: its number; later ones are higher.
        room: most tokens that may follow the prompt.
        defaults: the model's own sampling defaults.
        adapters: the names of those served beside the model, in the runner's order.
        fill_ends: tokens that end the text of a gap.
    """
    max_tokens = room if request.max_tokens is None else min(room, request.max_tokens)
    # Guesses are checked without masks and without forced tokens.
    may_guess = plan.guide is None and plan.budget_tokens is None
    return Sequence(
        request=request,
        sampling=row_rules(request.sampling, defaults),
        token_ids=ids,
        num_prompt_tokens=len(ids),
        max_tokens=max_tokens,
        decode=plan.decode,
        serial=serial,
        hashes=PrefixHashes(
            # An adapter changes keys and values; its name has no NUL, so no scope can feign another adapter.
            f"{request.adapter}\0{request.cache_scope}".encode(),
            [(span.start, span.content_hash) for span in extras.embeddings],
        ),
        embeddings=extras.embeddings,
        rope=extras.rope,
        adapter=adapters.index(request.adapter) if request.adapter else -1,
        end_ids=fill_ends if isinstance(request.prompt, TextPrompt) and request.prompt.suffix else frozenset(),
        lookup=Lookup(ids) if may_guess else None,
        reply=plan.reply(max_tokens),
    )
