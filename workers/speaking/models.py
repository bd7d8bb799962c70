"""A loaded text-to-speech model as two functions: text to symbols, symbols to sound.

Above: the engine's thread, the only one that calls them. Below: `piper.py`, `vits.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Waveform = npt.NDArray[np.float32]
Symbols = tuple[int, ...]

MAX_SYMBOLS = 1000
"""Of one call to `speak`: with its work the time is bounded until somebody else's turn."""


class SpeechModel(Protocol):
    """What the engine runs."""

    @property
    def sample_rate_hz(self) -> int:
        """Of what `speak` returns."""

    @property
    def frame_samples(self) -> int:
        """Samples that the model makes of one of its frames."""

    @property
    def voices(self) -> Sequence[str]:
        """Names, at least one."""

    def prepare(self) -> None:
        """Get ready in the thread that will call `read` and `speak`; called once."""

    def read(self, text: str) -> list[Symbols]:
        """Return what is to be spoken one after the other, each at most `MAX_SYMBOLS`; nothing if nothing can be said.

        Raises:
            HostlerError: it cannot be read.
        """

    def speak(self, symbols: Symbols, voice: int, speed: float) -> Waveform:
        """Return sound (samples,) float32, about -1 … 1, of the voice with index `voice`."""

    def close(self) -> None:
        """Free everything, end children."""
