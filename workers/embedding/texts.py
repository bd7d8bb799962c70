"""Texts to token sequences for one model, and what is too long. Blocking; the engine calls it off the loop.

Above: the engine. Below: transformers' tokenizer. Texts never become control tokens: their spellings are tokenized as
the text that they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hostler.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter

from workers.embedding.models import TokenSequence
from workers.engine import ChatPrompt, Prompt, TextPrompt, TokenPrompt

# A text of more characters per token of the limit is looked at in part first: it is nearly always too long.
_PROBE_CHARS_PER_TOKEN = 16
# No vocabulary's tokens are so long on average; what is cut anyway need not be read further.
_CUT_CHARS_PER_TOKEN = 256


class TextEncoder:
    """Tokenizes for one model.

    Args:
        tokenizer: transformers' tokenizer.
        vocab_size: ids at or above it are refused.
        max_tokens: longest sequence, special tokens included.
    """

    def __init__(self, tokenizer: Any, *, vocab_size: int, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_tokens = max_tokens
        self._has_types = "token_type_ids" in tokenizer.model_input_names

    def inputs(self, prompts: Sequence[TextPrompt | TokenPrompt], prefix: str = "") -> list[TokenSequence]:
        """Return one sequence for each input, texts with `prefix` before them, token ids as they are.

        Raises:
            InvalidRequest: empty, or ids that are not in the vocabulary.
            ContextLengthExceeded: longer than the model takes.
        """
        sequences: list[TokenSequence | None] = []
        texts: list[str] = []
        for prompt in prompts:
            if isinstance(prompt, TextPrompt):
                self._refuse_far_too_long(prompt.text)
                texts.append(prefix + prompt.text)
                sequences.append(None)
            else:
                sequences.append(self._given(prompt.ids))
        encoded = iter(self._encode(texts))
        found = [sequence or next(encoded) for sequence in sequences]
        longest = max(len(sequence.ids) for sequence in found)
        if longest > self._max_tokens:
            raise self._too_long(f"{longest} tokens", "input")
        if any(not sequence.ids for sequence in found):
            raise InvalidRequest("An input is empty.", param="input")
        return found

    def documents(self, texts: Sequence[str], prefix: str = "") -> list[TokenSequence]:
        """Return one sequence for each text; one that is too long is cut at its end."""
        return self._encode([(prefix + text)[: self._cut] for text in texts], truncation=True)

    def query(self, text: str, prefix: str = "") -> TokenSequence:
        """Return a query's sequence.

        Raises:
            ContextLengthExceeded: longer than the model takes.
        """
        sequence = self._encode([(prefix + text)[: self._cut]])[0]
        if len(sequence.ids) > self._max_tokens or len(prefix + text) > self._cut:
            raise self._too_long("more tokens", "query")
        return sequence

    def pairs(self, query: str, documents: Sequence[str]) -> list[TokenSequence]:
        """Return a sequence of query and document for each document, which is cut at its end if both are too long.

        Raises:
            ContextLengthExceeded: the query leaves no room for a document.
        """
        alone = self._encode([query[: self._cut], ""], pair_with=["", ""])
        if len(query) > self._cut or len(alone[0].ids) >= self._max_tokens:
            raise self._too_long("more tokens", "query")
        cut = [text[: self._cut] for text in documents]
        return self._encode([query] * len(cut), pair_with=cut, truncation="only_second")

    def prompt(self, prompt: Prompt) -> list[int]:
        """Return the ids of one prompt of any length.

        Raises:
            UnsupportedParameter: a chat: such models have no template.
        """
        if isinstance(prompt, ChatPrompt):
            raise UnsupportedParameter("This model has no chat template; it takes plain text.", param="messages")
        if isinstance(prompt, TokenPrompt):
            return list(prompt.ids)
        encoded = self._tokenizer(
            prompt.text, add_special_tokens=prompt.add_special_tokens, truncation=False, split_special_tokens=True
        )
        return [int(i) for i in encoded["input_ids"]]

    @property
    def _cut(self) -> int:
        return self._max_tokens * _CUT_CHARS_PER_TOKEN

    def _encode(
        self, texts: Sequence[str], *, pair_with: Sequence[str] | None = None, truncation: bool | str = False
    ) -> list[TokenSequence]:
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts),
            None if pair_with is None else list(pair_with),
            truncation=truncation,
            max_length=self._max_tokens if truncation else None,
            padding=False,
            split_special_tokens=True,
            verbose=False,
        )
        ids = encoded["input_ids"]
        types = encoded["token_type_ids"] if self._has_types else [()] * len(ids)
        return [TokenSequence(tuple(i), tuple(t)) for i, t in zip(ids, types, strict=True)]

    def _given(self, ids: tuple[int, ...]) -> TokenSequence:
        if (worst := max(ids, default=0)) >= self._vocab_size:
            raise InvalidRequest(f"Token id {worst} is outside the vocabulary of {self._vocab_size}.", param="input")
        return TokenSequence(ids, (0,) * len(ids) if self._has_types else ())

    def _refuse_far_too_long(self, text: str) -> None:
        probe = self._max_tokens * _PROBE_CHARS_PER_TOKEN
        if len(text) > probe and len(self._encode([text[:probe]])[0].ids) > self._max_tokens + 8:
            raise self._too_long(f"{len(text)} characters", "input")

    def _too_long(self, what: str, param: str) -> ContextLengthExceeded:
        return ContextLengthExceeded(
            f"This model's maximum context length is {self._max_tokens} tokens, however '{param}' has {what}. "
            "Shorten it.",
            param=param,
        )
