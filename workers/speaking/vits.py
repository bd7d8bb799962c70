"""VITS models of transformers, MMS's thousand languages among them (arXiv:2106.06103, arXiv:2305.13516).

Above: `opening.py`, the engine's thread. Below: transformers' definition, torch, and `phonemes.py` for those that were
trained on phonemes.
"""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import torch
from hostler.errors import ModelLoadFailed
from transformers import VitsModel, VitsTokenizer
from transformers.utils.logging import disable_progress_bar

from workers.engine import LoadSpec
from workers.speaking.models import MAX_SYMBOLS, Symbols, Waveform
from workers.speaking.phonemes import Phonemizer

# What transformers' tokenizer asks its phonemizer for, whatever the model's language.
_ESPEAK_VOICE = "en-us"


class Vits:
    """A model in memory.

    Args:
        module: transformers' `VitsModel`.
        tokenizer: its tokenizer; taken over.
        num_threads: of the CPU.
    """

    def __init__(self, module: Any, tokenizer: Any, num_threads: int) -> None:
        self._module = module
        self._tokenizer = tokenizer
        self._num_threads = num_threads
        self._phonemizer = Phonemizer() if tokenizer.phonemize else None
        # The tokenizer would call a package of its own for it.
        tokenizer.phonemize = False
        config = module.config
        self.sample_rate_hz = int(config.sampling_rate)
        self.frame_samples = math.prod(config.upsample_rates)
        self.voices = tuple(map(str, range(config.num_speakers))) if config.num_speakers > 1 else ("default",)

    def prepare(self) -> None:
        """Set this thread up."""
        torch.set_num_threads(self._num_threads)

    def read(self, text: str) -> list[Symbols]:
        """Return the symbols of a piece; nothing if it holds no character that the model knows."""
        tokenizer = self._tokenizer
        if self._phonemizer is None:
            return self._cut(text) if self._has_sound(text) else []
        plain = tokenizer.normalize_text(text) if tokenizer.normalize else text
        sentences = self._phonemizer.sentences(_ESPEAK_VOICE, plain)
        phonemes = " ".join("".join(sentence) for sentence in sentences)
        known = "".join(c for c in phonemes if c in tokenizer.encoder)
        return self._cut(known) if any(c.isalpha() for c in known) else []

    def _has_sound(self, text: str) -> bool:
        prepared, _ = self._tokenizer.prepare_for_tokenization(text)
        return any(c.isalnum() and c in self._tokenizer.encoder for c in prepared)

    def _cut(self, text: str) -> list[Symbols]:
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return [tuple(ids[at : at + MAX_SYMBOLS]) for at in range(0, len(ids), MAX_SYMBOLS)]

    @torch.inference_mode()
    def speak(self, symbols: Symbols, voice: int, speed: float) -> Waveform:
        """Return sound (samples,)."""
        module = self._module
        out = module(
            input_ids=torch.tensor([symbols], device=module.device),
            speaker_id=voice if module.config.num_speakers > 1 else None,
            speaking_rate=module.config.speaking_rate * speed,
        )
        waveform: Waveform = out.waveform[0].float().cpu().numpy()
        return waveform

    def close(self) -> None:
        """End the phonemizer."""
        if self._phonemizer is not None:
            self._phonemizer.close()


def open_vits(spec: LoadSpec, path: Path) -> tuple[Vits, int, int]:
    """Return a model, how many parameters it has, and their bytes. Blocking: seconds.

    Raises:
        ModelLoadFailed: its files cannot be served, or a package is missing.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        tokenizer: Any = VitsTokenizer.from_pretrained(path, local_files_only=True)
        options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
        kind: Any = VitsModel
        module, found = kind.from_pretrained(path, output_loading_info=True, **options)
    except Exception as error:  # transformers raises anything here
        raise ModelLoadFailed(f"The files of {spec.model} cannot be loaded: {type(error).__name__}.") from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ModelLoadFailed(f"The weights of {spec.model} lack {len(missing)} tensors, {missing[0]} among them.")
    if tokenizer.is_uroman and importlib.util.find_spec("uroman") is None:
        raise ModelLoadFailed(f"{spec.model} reads its language in Latin letters and needs: pip install uroman.")
    module = module.to(spec.device).train(False).requires_grad_(False)
    parameters = list(module.parameters())
    num_threads = spec.num_threads or max(1, len(os.sched_getaffinity(0)) - 1)
    return (
        Vits(module, tokenizer, num_threads),
        sum(p.numel() for p in parameters),
        sum(p.numel() * p.element_size() for p in parameters),
    )
