"""Prompts to token ids: renders the model's chat template, keeps user text from becoming control tokens, and
refuses what is far too long before spending time on it. Blocking; call it off the loop."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any

from hostler.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from jinja2.exceptions import TemplateError

from workers.engine import ChatPrompt, Prompt, TextPrompt
from workers.text.fill import detect_fill_format
from workers.text.parts import in_parts, roles_in_parts
from workers.text.system_turns import SystemTurns, said_by_user, system_turns
from workers.text.time_limit import TookTooLong, at_most

# A Unicode noncharacter: never legitimate in text, so it can mark where a control token's spelling was broken up.
_BREAK = "\ufdd0"
_PROBE_CHARS = 8192
TEMPLATE_LIMIT_S = 5.0
"""A template is done with the longest conversations in a fraction of a second."""


class PromptEncoder:
    """Turns prompts into ids for one model.

    Args:
        tokenizer: transformers' tokenizer.
        vocab_size: ids at or above it are refused.
        max_context_tokens: longer prompts are refused, very long ones without tokenizing all of it.
        image_token: what the template writes for an image; None for a model without images.
        arguments_as_text: the template joins the arguments of calls as text.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        max_context_tokens: int,
        *,
        image_token: str | None = None,
        arguments_as_text: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_context_tokens = max_context_tokens
        self._arguments_as_text = arguments_as_text
        self._image_token = image_token
        texts = {t.content for t in tokenizer.added_tokens_decoder.values()} | {image_token or ""}
        specials = sorted((text for text in texts if text.strip()), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, specials))) if specials else None
        self._longest_control = len(specials[0]) if specials else 0
        self.fill_format = detect_fill_format(texts)
        self._in_parts, self._system_turns = frozenset[str](), SystemTurns()
        if getattr(tokenizer, "chat_template", None):
            self._in_parts = roles_in_parts(self._rendered)
            self._system_turns = system_turns(self._rendered, self._in_parts)

    def encode(self, prompt: Prompt, image_texts: SequenceOf[str] = ()) -> list[int]:
        """Return the prompt's token ids.

        Args:
            prompt: what to encode.
            image_texts: for each image of a chat, what its placeholder in the rendered template becomes.

        Raises:
            InvalidRequest: empty, unknown ids, or the template refuses these messages.
            ContextLengthExceeded: longer than the model's context.
        """
        if isinstance(prompt, ChatPrompt):
            rendered = self._render(prompt)
            if prompt.images:
                rendered = self._expand(rendered, image_texts, len(prompt.images))
            ids = self._encode_text(rendered, add_special_tokens=False)
        elif isinstance(prompt, TextPrompt):
            ids = self.encode_raw(prompt) or self._beginning()
        else:
            ids = list(prompt.ids)
        if not ids:
            raise InvalidRequest("The prompt is empty: there is nothing to continue.", param="messages")
        # Of a text, too: tokenizers have had tokens added that the model has no embedding of.
        if (worst := max(ids)) >= self._vocab_size:
            raise InvalidRequest(f"Token id {worst} is outside the vocabulary of {self._vocab_size}.", param="prompt")
        return ids

    def encode_raw(self, prompt: TextPrompt) -> list[int]:
        """Return the ids of a text whose control tokens count, perhaps none; with a suffix, of both around a gap.

        Raises:
            UnsupportedParameter: a suffix, of a model that fills no gaps.
            ContextLengthExceeded: longer than the model's context.
        """
        if prompt.suffix:
            if self.fill_format is None:
                raise UnsupportedParameter("This model has no tokens for filling a gap.", param="suffix")
            text = self.fill_format.render(self._neutralize(prompt.text), self._neutralize(prompt.suffix))
            return self._encode_text(text, add_special_tokens=True)
        text = prompt.text.replace(_BREAK, "")
        # Who writes the beginning of a text in full does not mean it twice.
        begun = bool(bos := self._tokenizer.bos_token) and text.startswith(str(bos))
        return self._encode_text(text, add_special_tokens=prompt.add_special_tokens and not begun)

    def _beginning(self) -> list[int]:
        """Return what stands before the first word of a document, as this model was taught; perhaps nothing."""
        vocabulary = self._tokenizer.get_added_vocab()
        known = (self._tokenizer.bos_token_id, vocabulary.get("<|endoftext|>"), self._tokenizer.eos_token_id)
        return next(([int(i)] for i in known if i is not None), [])

    def _render(self, prompt: ChatPrompt) -> str:
        if not getattr(self._tokenizer, "chat_template", None):
            raise UnsupportedParameter(
                "This model has no chat template, so it cannot chat. Use the completions endpoint.", param="messages"
            )
        for message in prompt.messages:
            content = message.get("content")
            for part in content if isinstance(content, list) else [{"text": content}]:
                if isinstance(text := part.get("text"), str):
                    self._refuse_far_too_long(text)
        turns = said_by_user(prompt.messages, self._system_turns)
        messages = [in_parts(self._clean_message(message), self._in_parts) for message in turns]
        try:
            with at_most(TEMPLATE_LIMIT_S):
                rendered = self._apply(
                    replace(prompt, messages=messages, tools=[self._clean(tool) for tool in prompt.tools])
                )
        except TookTooLong:
            raise InvalidRequest(
                f"The model's chat template takes longer than {TEMPLATE_LIMIT_S:g} s with these messages.",
                param="messages",
            ) from None
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            reason = str(error) if isinstance(error, TemplateError) else type(error).__name__
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {reason[:300]}", param="messages"
            ) from error
        return rendered

    def _rendered(self, messages: SequenceOf[Mapping[str, object]]) -> str:
        try:
            with at_most(TEMPLATE_LIMIT_S):
                return self._apply(ChatPrompt(messages))
        except TookTooLong:
            raise TemplateError("The chat template takes too long.") from None

    def _apply(self, prompt: ChatPrompt) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                prompt.messages,
                tools=list(prompt.tools) or None,
                tokenize=False,
                add_generation_prompt=not prompt.continue_final_message,
                continue_final_message=prompt.continue_final_message,
                **self._clean(prompt.template_kwargs),
            )
        )

    def _expand(self, rendered: str, image_texts: SequenceOf[str], num_images: int) -> str:
        """Put each image's tokens where the template put its placeholder; nobody else can have written one."""
        if self._image_token is None or len(image_texts) != num_images:
            raise UnsupportedParameter("Image input is not supported by this model.", param="messages")
        pieces = rendered.split(self._image_token)
        if len(pieces) != num_images + 1:
            raise InvalidRequest(
                f"The model's chat template places {len(pieces) - 1} of these {num_images} images. Send images in user "
                "messages.",
                param="messages",
            )
        return "".join(piece + text for piece, text in zip(pieces, (*image_texts, ""), strict=True))

    def _clean_message(self, message: Mapping[str, object]) -> dict[str, Any]:
        """Break up control tokens in a message; one that is cut across its parts, too."""
        cleaned = self._clean(self._with_arguments(message))
        if isinstance(content := message.get("content"), list):
            cleaned["content"] = self._clean_parts(content)
        return cleaned

    def _with_arguments(self, message: Mapping[str, object]) -> Mapping[str, object]:
        """Write the arguments of earlier calls as this template wants them."""
        calls = message.get("tool_calls")
        if not (self._arguments_as_text and isinstance(calls, list)):
            return message
        texts = [
            {**call, "function": {**call["function"], "arguments": _as_text(call["function"]["arguments"])}}
            for call in calls
        ]
        return {**message, "tool_calls": texts}

    def _clean(self, values: Mapping[str, object]) -> dict[str, Any]:
        """Break up control tokens in all that people and tools wrote, keys too; the template's own stay whole."""
        return {self._neutralize(key): self._cleaned(value) for key, value in values.items()}

    def _cleaned(self, value: object) -> object:
        if isinstance(value, str):
            return self._neutralize(value)
        if isinstance(value, Mapping):
            return self._clean(value)
        if isinstance(value, list | tuple):
            return [self._cleaned(item) for item in value]
        return value

    def _clean_parts(self, parts: SequenceOf[Mapping[str, object]]) -> list[dict[str, object]]:
        """The same for a list of parts, whose texts a template may join, perhaps trimmed."""
        cleaned = [dict(part) for part in parts]
        textual = [part for part in cleaned if isinstance(part.get("text"), str)]
        texts = [str(part["text"]).replace(_BREAK, "") for part in textual]
        seams = self._forged_seams(texts) | self._forged_seams([text.strip() for text in texts])
        for index, (part, text) in enumerate(zip(textual, texts, strict=True)):
            part["text"] = (_BREAK if index in seams else "") + self._neutralize(text)
        return cleaned

    def _forged_seams(self, texts: SequenceOf[str]) -> set[int]:
        """Return the texts before which a break must stand, lest a control token come to be across the seam."""
        if self._control is None:
            return set()
        joined, seam, forged = "".join(texts), 0, set()
        for index, text in enumerate(texts):
            for start in range(max(0, seam - self._longest_control), seam):
                match = self._control.match(joined, start)
                if match is not None and match.end() > seam:
                    forged.add(index)
            seam += len(text)
        return forged

    def _neutralize(self, text: str) -> str:
        text = text.replace(_BREAK, "")
        if self._control is None:
            return text
        return self._control.sub(lambda match: match[0][0] + _BREAK + match[0][1:], text)

    def _encode_text(self, text: str, *, add_special_tokens: bool) -> list[int]:
        self._refuse_far_too_long(text)
        ids: list[int] = []
        for index, piece in enumerate(text.split(_BREAK)):
            encoded = self._tokenizer.encode(piece, add_special_tokens=add_special_tokens and index == 0)
            ids.extend(encoded)
        return ids

    def _refuse_far_too_long(self, text: str) -> None:
        """Count tokens piece by piece and stop as soon as the context is surely exceeded.

        Cutting text can only change the count by a token or so at each cut, which the allowance covers.
        """
        if len(text) <= 4 * self._max_context_tokens:
            return
        count = 0
        for index, start in enumerate(range(0, len(text), _PROBE_CHARS), start=1):
            count += len(self._tokenizer.encode(text[start : start + _PROBE_CHARS], add_special_tokens=False))
            if count - 4 * index > self._max_context_tokens:
                raise ContextLengthExceeded(
                    f"This prompt of {len(text)} characters is longer than the model's context of "
                    f"{self._max_context_tokens} tokens. Shorten it.",
                    param="messages",
                )


def _as_text(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
