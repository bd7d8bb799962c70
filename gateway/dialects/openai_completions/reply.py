"""Worker events → one `text_completion` object. Above: `routes.completions`; below: `logprobs`, the chat's `shapes`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.openai_chat.shapes import SYSTEM_FINGERPRINT, finish_reason, usage_object
from gateway.dialects.openai_completions.logprobs import TextOffsets, legacy_logprobs


@dataclass(slots=True)
class _Choice:
    text: list[str] = field(default_factory=list)
    logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    finish: pb.Finish = field(default_factory=pb.Finish)

    @property
    def mean_logprob(self) -> float:
        """Of its tokens; a reply without any is the worst."""
        if not self.logprobs:
            return -math.inf
        return sum(item.logprob for item in self.logprobs) / len(self.logprobs)


class CompletionBuilder:
    """Gathers the events of all generations of one request.

    Args:
        echoes: for each prompt the text that its choices begin with; empty for none.
        n: choices of each prompt in the reply.
        best_of: generations of each prompt; the likeliest per token are kept, best first.
        wants_logprobs: whether choices carry logprobs.
    """

    def __init__(
        self,
        *,
        reply_id: str,
        created_unix_s: int,
        model: str,
        echoes: Sequence[str],
        n: int,
        best_of: int,
        wants_logprobs: bool,
    ) -> None:
        self._head = {"id": reply_id, "object": "text_completion", "created": created_unix_s, "model": model}
        self._echoes = echoes
        self._n = n
        self._best_of = best_of
        self._wants_logprobs = wants_logprobs
        self._choices = [_Choice() for _ in range(len(echoes) * best_of)]

    def add(self, index: int, event: pb.GenerateResponse) -> None:
        """Take one event of generation `index`."""
        choice = self._choices[index]
        kind = event.WhichOneof("event")
        if kind == "text":
            choice.text.append(event.text.text)
            choice.logprobs.extend(event.text.logprobs)
        elif kind == "prompt_logprobs":
            choice.prompt_logprobs.extend(event.prompt_logprobs.tokens)
        elif kind == "finish":
            choice.finish = event.finish

    def build(self) -> dict[str, Any]:
        """Return the reply; after every generation has finished."""
        choices: list[dict[str, Any]] = []
        for prompt, echo in enumerate(self._echoes):
            generated = self._choices[prompt * self._best_of : (prompt + 1) * self._best_of]
            if self._best_of > self._n:
                generated.sort(key=lambda choice: choice.mean_logprob, reverse=True)
            choices += [self._choice(len(choices) + at, c, echo) for at, c in enumerate(generated[: self._n])]
        usage = usage_of((index // self._best_of, choice.finish.usage) for index, choice in enumerate(self._choices))
        return {**self._head, "choices": choices, "usage": usage, "system_fingerprint": SYSTEM_FINGERPRINT}

    def _choice(self, index: int, choice: _Choice, echo: str) -> dict[str, Any]:
        text = "".join(choice.text)
        return {
            "index": index,
            "text": echo + text,
            "logprobs": self._logprobs(choice, echo, text) if self._wants_logprobs else None,
            "finish_reason": finish_reason(choice.finish, called_tools=False),
        }

    @staticmethod
    def _logprobs(choice: _Choice, echo: str, text: str) -> dict[str, list[Any]]:
        offsets = TextOffsets()
        offsets.extend(echo)
        prompt = legacy_logprobs(choice.prompt_logprobs, offsets)
        offsets.end()
        offsets.extend(text)
        reply = legacy_logprobs(choice.logprobs, offsets)
        return {name: prompt[name] + reply[name] for name in prompt}


def usage_of(usages: Iterable[tuple[int, pb.Usage]]) -> dict[str, Any]:
    """Return the usage of (prompt index, usage) of all generations: those of one prompt share it, counted once."""
    prompts: dict[int, int] = {}
    cached: dict[int, int] = {}
    total = pb.Usage()
    for prompt, usage in usages:
        prompts[prompt] = max(prompts.get(prompt, 0), usage.num_prompt_tokens)
        cached[prompt] = min(cached.get(prompt, usage.num_cached_tokens), usage.num_cached_tokens)
        total.num_completion_tokens += usage.num_completion_tokens
        total.num_reasoning_tokens += usage.num_reasoning_tokens
    total.num_prompt_tokens, total.num_cached_tokens = sum(prompts.values()), sum(cached.values())
    return usage_object([total])
