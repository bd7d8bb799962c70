"""Grammars that replies must follow: compiled off the loop within bounds, cached, turned into token masks.

Above: `reply.py` asks for a `Guide` when a request is created; the engine's thread asks `MaskPool` for masks while the
model runs. Below: llguidance, whose grammars are Lark text, JSON Schemas or both
(https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md). `schemas.py` has checked schemas before.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import llguidance
import numpy as np
import torch
from hostler.errors import HostlerError, Internal, InvalidRequest

from workers.text.vocabulary import TokenBytes

log = logging.getLogger(__name__)

MAX_GRAMMAR_BYTES = 1024 * 1024
COMPILE_DEADLINE_S = 10.0
_CACHED_GRAMMARS = 64
_CACHED_BYTES = 8 * 2**20

# Bounds of one grammar: what a hostile schema or regex may cost. A mask of a sane grammar takes far below 1 ms.
_LIMITS = {
    "max_items_in_row": 1000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 500_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


class Guide:
    """Where one reply stands in its grammar. Used by one thread at a time: a mask thread while the model runs, the
    engine's thread otherwise.

    Args:
        matcher: llguidance's matcher at the grammar's beginning.
        vocab_size: width of a row of logits.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._bits = np.zeros((vocab_size + 31) // 32, dtype=np.int32)

    @property
    def stopped(self) -> bool:
        """Whether nothing may follow but the end."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> torch.Tensor:
        """Return (vocab,) bool: the tokens that may come next; end-of-reply tokens only where the grammar accepts.

        Raises:
            InvalidRequest: the grammar cost more than its bounds.
        """
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            raise InvalidRequest(
                "Following this grammar or schema took more work than a request may cost. Simplify it.",
                param="response_format",
            )
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little", count=self._vocab_size)
        return torch.from_numpy(bits.view(np.bool_))

    def permits(self, token_id: int) -> bool:
        """Return whether the mask computed last lets a token through."""
        return bool(int(self._bits[token_id // 32]) >> (token_id % 32) & 1)

    def accept(self, token_id: int) -> None:
        """Take the token that was chosen.

        Raises:
            Internal: it was not allowed, which would be a fault of ours.
        """
        if not self._matcher.consume_token(token_id):
            log.error("token outside the grammar", extra={"error": self._matcher.get_error()[:200]})
            raise Internal("A token left the grammar of this request; the server's log has the details.")


PendingMasks: TypeAlias = "Sequence[Future[torch.Tensor] | None]"


class MaskPool:
    """Computes masks in threads of its own (llguidance lets go of the interpreter lock) beside the forward pass."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="mask")

    def submit(self, guides: Sequence[Guide | None]) -> PendingMasks:
        """Begin the masks of a step's rows, in order; None where a row is free."""
        return [None if guide is None else self._threads.submit(guide.allowed) for guide in guides]

    def close(self) -> None:
        """End the threads once they are idle."""
        self._threads.shutdown(wait=False)


def collect(futures: PendingMasks) -> list[torch.Tensor | HostlerError | None]:
    """Wait for submitted masks; return for each row its mask, None where it is free, or the error it fails with."""
    masks: list[torch.Tensor | HostlerError | None] = []
    for future in futures:
        try:
            masks.append(None if future is None else future.result())
        except HostlerError as error:
            masks.append(error)
        except Exception:
            log.exception("mask failed")
            masks.append(Internal("The grammar of this request could not be followed; the server's log tells why."))
    return masks


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Methods are called from the asyncio loop only.

    Args:
        tokenizer: transformers' fast tokenizer.
        vocab_size: width of a row of logits.
        eos_ids: tokens that end a reply.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = sorted(eos_ids)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammar")
        self._own: Future[Any] | None = None
        self._limits = llguidance.LLParserLimits(**_LIMITS)  # type: ignore[arg-type]
        self._cache: OrderedDict[str, Any] = OrderedDict()
        self._cached_bytes = 0

    async def guide(self, grammar: str, param: str) -> Guide:
        """Return a fresh guide along `grammar` (Lark text or llguidance's JSON).

        Raises:
            InvalidRequest: it cannot be compiled, or not within its bounds; names the field `param`.
        """
        prototype: Any = self._cache.get(grammar)
        if prototype is None:
            if len(grammar) > MAX_GRAMMAR_BYTES:
                raise InvalidRequest(f"'{param}' is longer than {MAX_GRAMMAR_BYTES} bytes as a grammar.", param=param)
            try:
                prototype = await asyncio.wait_for(
                    asyncio.get_running_loop().run_in_executor(self._threads, self._compile, grammar),
                    COMPILE_DEADLINE_S,
                )
            except TimeoutError:
                raise InvalidRequest(
                    f"'{param}' could not be compiled within {COMPILE_DEADLINE_S:g} seconds. Simplify it.", param=param
                ) from None
            except ValueError as error:
                raise InvalidRequest(f"'{param}' cannot be followed: {error}", param=param) from error
            self._keep(grammar, prototype)
        else:
            self._cache.move_to_end(grammar)
        return Guide(prototype.deep_copy(), self._vocab_size)

    def is_marker(self, token_id: int) -> bool:
        """Tell whether grammars must name this token by its id, since its spelling is not text. Blocking, once."""
        return bool(self._vocabulary().is_special_token(token_id))

    async def warm_up(self) -> None:
        """Read the vocabulary ahead of the first request."""
        await asyncio.get_running_loop().run_in_executor(self._threads, self._vocabulary)

    def close(self) -> None:
        """End the threads once they are idle."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _vocabulary(self) -> Any:
        if self._own is None:
            self._own = Future()
            try:
                tokens = _Tokens(self._tokenizer, self._vocab_size, self._eos_ids)
                self._own.set_result(
                    llguidance.LLTokenizer(
                        llguidance.TokenizerWrapper(tokens), n_vocab=self._vocab_size, eos_token=self._eos_ids or None
                    )
                )
            except BaseException as error:
                self._own.set_exception(error)
        return self._own.result()

    def _compile(self, grammar: str) -> Any:
        matcher = llguidance.LLMatcher(self._vocabulary(), grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise ValueError(_first_line(matcher.get_error()))
        return matcher

    def _keep(self, grammar: str, prototype: Any) -> None:
        if grammar in self._cache:
            return
        self._cache[grammar] = prototype
        self._cached_bytes += len(grammar)
        while len(self._cache) > _CACHED_GRAMMARS or (self._cached_bytes > _CACHED_BYTES and len(self._cache) > 1):
            old, _ = self._cache.popitem(last=False)
            self._cached_bytes -= len(old)


class _Tokens:
    """What llguidance must know of a tokenizer. Given as text it would parse the whole of it anew, and hold the
    interpreter lock for more than twice as long, with every stream standing still: 1.3 s for 152,000 tokens.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self.eos_token_id = eos_ids[0] if eos_ids else 0
        self.tokens = TokenBytes(tokenizer).all(vocab_size)
        # Some tokenizers call <tool_call> and the like no special tokens, but text never spells them either.
        self.special_token_ids = [
            i
            for i, token in tokenizer.added_tokens_decoder.items()
            if token.special or (token.content.startswith("<") and token.content.endswith(">"))
        ]
        self._backend = tokenizer.backend_tokenizer

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids


def _first_line(message: str) -> str:
    line = next((line for line in message.splitlines() if line.strip()), "unknown reason")
    return line.strip()[:300]
