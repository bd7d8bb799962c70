"""What a Whisper model's tokens mean: languages, tasks, times, what it must not say. Above: `opening.py`, `rules.py`.

Read from the model's generation_config.json, and from its tokenizer where that is silent (older models).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hostler.errors import InvalidRequest, UnsupportedParameter

TIME_STEP_S = 0.02
_DEFAULT_MAX_INITIAL_S = 1.0
MAX_PROMPT_TOKENS = 223
"""Half of Whisper's text context, less the token that opens it; the end of a longer prompt counts (OpenAI's rule)."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token ids.

    Attributes:
        size: of the vocabulary; ids from `first_time` on are times in steps of 20 ms.
        languages: code → token; empty for a model of English only.
        names: code → English name of the language.
        suppressed: never said.
        suppressed_first: not said as the first token of the text.
        max_initial_step: the latest time that a window may begin with, in steps.
    """

    size: int
    start: int
    end: int
    previous: int
    no_speech: int | None
    no_times: int
    transcribe: int
    translate: int
    languages: Mapping[str, int]
    names: Mapping[str, str]
    suppressed: tuple[int, ...]
    suppressed_first: tuple[int, ...]
    max_initial_step: int

    @property
    def first_time(self) -> int:
        """The token of time 0."""
        return self.no_times + 1

    @property
    def is_multilingual(self) -> bool:
        """Whether it knows more than English."""
        return bool(self.languages)

    def language(self, wanted: str) -> str:
        """Return the code of a language given as code, code with region, or English name; "" for "".

        Raises:
            InvalidRequest: no such language.
            UnsupportedParameter: the model does not know it.
        """
        text = wanted.strip().lower()
        if not text or text == "auto":
            return ""
        named = {name: code for code, name in self.names.items()}
        code = named.get(text, text.replace("_", "-").partition("-")[0])
        if code not in self.names:
            raise InvalidRequest(
                f"Invalid 'language': {wanted[:40]!r} is not a language code such as 'en' or 'pt'.", param="language"
            )
        if self.is_multilingual and code not in self.languages:
            raise UnsupportedParameter(f"This model does not know {self.names[code].capitalize()}.", param="language")
        if not self.is_multilingual and code != "en":
            raise UnsupportedParameter("This model hears English only.", param="language")
        return code

    def opening(self, code: str, *, translate: bool, times: bool, prompt: list[int]) -> list[int]:
        """Return the tokens that a window's text is asked for with."""
        tokens = [self.previous, *prompt[-MAX_PROMPT_TOKENS:]] if prompt else []
        tokens.append(self.start)
        if self.is_multilingual:
            tokens += [self.languages[code], self.translate if translate else self.transcribe]
        return tokens if times else [*tokens, self.no_times]


def read_vocabulary(tokenizer: Any, generation: Any, size: int) -> Vocabulary:
    """Return the vocabulary of a model.

    Args:
        tokenizer: transformers', loaded.
        generation: its GenerationConfig; fields may be missing.
        size: rows of the output projection.

    Raises:
        KeyError: a token that every Whisper model has is missing.
    """
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    known = tokenizer.get_vocab()

    def optional(*tokens: str) -> int | None:
        return next((int(known[token]) for token in tokens if token in known), None)

    def required(*tokens: str) -> int:
        found = optional(*tokens)
        if found is None:
            raise KeyError(tokens[0])
        return found

    names = {str(code): str(name) for code, name in LANGUAGES.items()}
    declared = getattr(generation, "lang_to_id", None)
    multilingual = bool(getattr(generation, "is_multilingual", size >= 51_865))
    table: dict[str, int] = {}
    if multilingual:
        table = (
            {token.strip("<|>"): int(number) for token, number in declared.items()}
            if declared
            else {code: int(known[f"<|{code}|>"]) for code in names if f"<|{code}|>" in known}
        )
    initial = getattr(generation, "max_initial_timestamp_index", None)
    return Vocabulary(
        size=size,
        start=required("<|startoftranscript|>"),
        end=required("<|endoftext|>"),
        previous=required("<|startofprev|>"),
        no_speech=optional("<|nospeech|>", "<|nocaptions|>"),
        no_times=int(getattr(generation, "no_timestamps_token_id", None) or required("<|notimestamps|>")),
        transcribe=required("<|transcribe|>"),
        translate=required("<|translate|>"),
        languages={code: number for code, number in table.items() if number < size},
        names=names,
        suppressed=tuple(int(i) for i in getattr(generation, "suppress_tokens", None) or () if 0 <= i < size),
        suppressed_first=tuple(
            int(i) for i in getattr(generation, "begin_suppress_tokens", None) or () if 0 <= i < size
        ),
        max_initial_step=int(initial) if initial is not None else round(_DEFAULT_MAX_INITIAL_S / TIME_STEP_S),
    )
