"""Worker events → `text_completion` frames. Above: `routes.completions`; below: `logprobs`, `reply`, `sse`.

A choice's echo comes first, with the prompt's logprobs where they are wanted; `finish_reason` comes once, with no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.openai_chat.shapes import SYSTEM_FINGERPRINT, finish_reason
from gateway.dialects.openai_completions.logprobs import TextOffsets, legacy_logprobs
from gateway.dialects.openai_completions.reply import usage_of
from gateway.sse import data_frame


class CompletionEncoder:
    """Encodes the events of one request, all choices.

    Args:
        echoes: for each prompt the text that its choices begin with; empty for none.
        n: choices of each prompt.
        include_usage: whether chunks carry `usage` (null) and `usage()` will be sent.
        wants_logprobs: whether chunks carry logprobs.
    """

    def __init__(
        self,
        *,
        reply_id: str,
        created_unix_s: int,
        model: str,
        echoes: Sequence[str],
        n: int,
        include_usage: bool,
        wants_logprobs: bool,
    ) -> None:
        self._head = {
            "id": reply_id,
            "object": "text_completion",
            "created": created_unix_s,
            "model": model,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }
        self._tail: dict[str, Any] = {"usage": None} if include_usage else {}
        self._n = n
        self._echoes = echoes
        self._wants_logprobs = wants_logprobs
        self._offsets = [TextOffsets() for _ in range(n * len(echoes))]
        self._opened: set[int] = set()
        self._usages: list[tuple[int, pb.Usage]] = []

    def encode(self, index: int, event: pb.GenerateResponse) -> bytes:
        """Return the frames of one event of choice `index`; empty when the client sees nothing of it."""
        kind = event.WhichOneof("event")
        if kind == "prompt_logprobs":
            return self._open(index, event.prompt_logprobs.tokens)
        if kind == "text":
            delta = event.text
            if not delta.text and not (self._wants_logprobs and delta.logprobs):
                return b""
            return self._open(index) + self._text(index, delta.text, delta.logprobs)
        if kind == "finish":
            self._usages.append((index // self._n, event.finish.usage))
            reason = finish_reason(event.finish, called_tools=False)
            return self._open(index) + self._chunk(index, "", None, reason)
        return b""

    def usage(self) -> bytes:
        """Return the usage frame; after every choice has finished."""
        return data_frame({**self._head, "choices": [], "usage": usage_of(self._usages)})

    def _open(self, index: int, scored: Sequence[pb.TokenLogprob] = ()) -> bytes:
        """Return the frame of the echo, once."""
        echo = self._echoes[index // self._n]
        if index in self._opened:
            return b""
        self._opened.add(index)
        if not echo and not scored:
            return b""
        frame = self._text(index, echo, scored)
        self._offsets[index].end()
        return frame

    def _text(self, index: int, text: str, items: Sequence[pb.TokenLogprob]) -> bytes:
        logprobs = None
        if self._wants_logprobs:
            self._offsets[index].extend(text)
            logprobs = legacy_logprobs(items, self._offsets[index])
        return self._chunk(index, text, logprobs, None)

    def _chunk(self, index: int, text: str, logprobs: dict[str, list[Any]] | None, finish: str | None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return data_frame({**self._head, "choices": [choice], **self._tail})
