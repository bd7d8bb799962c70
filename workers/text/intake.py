"""Prompts on their way in: messages to token ids, pictures to rows, off the event loop.

Above: the engine's asyncio side. Below: `prompts.py` (template and tokenizer), `vision.py`. One thread encodes, another
looks at pictures, so that a text need not wait for somebody's picture.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from workers.engine import ChatPrompt, Prompt, TextPrompt
from workers.text.directory import LoadedModel
from workers.text.embeddings import PromptExtras
from workers.text.fill import FillFormat
from workers.text.prompts import PromptEncoder

if TYPE_CHECKING:
    from workers.text.vision import Picture, Vision


class Intake:
    """Encodes prompts of one model. Used from its asyncio loop.

    Args:
        loaded: the model.
        num_threads: for looking at pictures.
        changed: called when `num_preparing` changes.
        arguments_as_text: the template joins the arguments of calls as text.
    """

    def __init__(
        self, loaded: LoadedModel, num_threads: int, changed: Callable[[], None], *, arguments_as_text: bool
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._tokenizer = loaded.tokenizer
        self._vision = loaded.vision
        self._changed = changed
        self._encoder = PromptEncoder(
            loaded.tokenizer,
            loaded.facts.vocab_size,
            loaded.kv.max_context_tokens,
            image_token=loaded.vision.token if loaded.vision else None,
            arguments_as_text=arguments_as_text,
        )
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._seeing = ThreadPoolExecutor(
            1, thread_name_prefix="vision", initializer=torch.set_num_threads, initargs=(num_threads,)
        )
        self.num_preparing = 0

    @property
    def fill_format(self) -> FillFormat | None:
        """How the model fills a gap between two texts; None if it does not."""
        return self._encoder.fill_format

    @property
    def fill_ends(self) -> frozenset[int]:
        """The tokens that end the text of a gap; none of a model that fills none."""
        return self.fill_format.end_ids(self._tokenizer) if self.fill_format else frozenset()

    def see_with(self, vision: Vision | None) -> None:
        """Look at pictures with these eyes from now on; None while the model sleeps."""
        self._vision = vision

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """Return a prompt's token ids; none for an empty text."""
        if isinstance(prompt, TextPrompt):
            return await self._loop.run_in_executor(self._encoding, self._encoder.encode_raw, prompt)
        ids, _ = await self._encode(prompt)
        return ids

    async def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return str(await self._loop.run_in_executor(self._encoding, self._tokenizer.decode, list(ids)))

    async def prepare(self, prompt: Prompt, check: Callable[[int, int], None]) -> tuple[list[int], PromptExtras]:
        """Return a prompt's token ids and, once it is known to fit, the rest of it.

        Args:
            check: called with (prompt tokens, prompts with pictures being prepared); raises what refuses the prompt.
        """
        if not isinstance(prompt, ChatPrompt) or not prompt.images:
            return (await self._encode(prompt))[0], PromptExtras()
        check(0, self.num_preparing)
        self.num_preparing += 1
        self._changed()
        try:
            ids, pictures = await self._encode(prompt)
            check(len(ids), 0)
            assert self._vision is not None  # else encoding has refused the images
            return ids, await self._loop.run_in_executor(self._seeing, self._vision.place, ids, pictures)
        finally:
            self.num_preparing -= 1
            self._changed()

    async def _encode(self, prompt: Prompt) -> tuple[list[int], list[Picture]]:
        """Return a prompt's token ids, and its pictures decoded but not yet looked at."""
        pictures: list[Picture] = []
        if isinstance(prompt, ChatPrompt) and prompt.images and self._vision is not None:
            pictures = await self._loop.run_in_executor(self._seeing, self._vision.read, prompt.images)
        texts = [picture.text for picture in pictures]
        return await self._loop.run_in_executor(self._encoding, self._encoder.encode, prompt, texts), pictures

    def close(self) -> None:
        """End the threads; nothing waits for what they were at."""
        self._encoding.shutdown(wait=False)
        self._seeing.shutdown(wait=False, cancel_futures=True)
