"""Piper's voices: a VITS model in one ONNX file and, beside it, `.onnx.json` with its symbols and speakers.

Above: `opening.py`, the engine's thread. Below: onnxruntime, `phonemes.py`. Symbols as Piper makes them
(OHF-Voice/piper1-gpl, `phoneme_ids.py`): a begin mark, each phoneme followed by a blank, an end mark; sound is brought
to full scale piece by piece, as Piper does.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hostler.errors import ModelLoadFailed

from workers.engine import LoadSpec
from workers.speaking.models import MAX_SYMBOLS, Symbols, Waveform
from workers.speaking.phonemes import Phonemizer

_BEGIN, _END, _BLANK = "^", "$", "_"
_MAX_CONFIG_BYTES = 1 << 20
_INPUTS = {"input", "input_lengths", "scales"}
_MAX_RATE_HZ = 192_000
# Each phoneme is two symbols, and a cluster or an entry of the map may be several.
_MAX_PHONEMES = MAX_SYMBOLS // 2 - 100
# Below this it is silence, which must not be brought to full scale.
_SILENCE = 1e-4


@dataclass(frozen=True, slots=True)
class PiperConfig:
    """What `.onnx.json` says.

    Attributes:
        ids: phoneme → its symbols.
        phonemes: "espeak", or "text" where each character is a symbol.
        espeak_voice: language and accent.
        clusters: phonemes that are one symbol together.
        voices: names of the speakers, by their number.
        scales: noise, length (larger is slower), noise of the durations.
    """

    sample_rate_hz: int
    ids: Mapping[str, Sequence[int]]
    phonemes: str
    espeak_voice: str
    clusters: tuple[tuple[str, ...], ...]
    voices: tuple[str, ...]
    scales: tuple[float, float, float]
    frame_samples: int


def read_config(path: Path, fallback_voice: str) -> PiperConfig:
    """Return a voice's configuration.

    Args:
        path: the `.onnx.json`.
        fallback_voice: name of the only speaker of a voice that does not name itself.

    Raises:
        ModelLoadFailed: it is none, or asks for what is not here.
    """
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ValueError("too large")
        config = json.loads(path.read_text(encoding="utf-8"))
        read = _parse(config, fallback_voice)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadFailed(f"{path.name} is not the configuration of a Piper voice.") from error
    if read.phonemes not in ("espeak", "text") or read.espeak_voice == "ar":
        kind = "Arabic vowel marks" if read.espeak_voice == "ar" else f"{read.phonemes[:40]!r} phonemes"
        raise ModelLoadFailed(f"The voice {path.name} needs {kind}, which are not made here.")
    if not 8000 <= read.sample_rate_hz <= _MAX_RATE_HZ or read.frame_samples < 1:
        raise ModelLoadFailed(f"{path.name} names no possible sample rate.")
    if any(mark not in read.ids for mark in (_BEGIN, _END, _BLANK)):
        raise ModelLoadFailed(f"{path.name} lacks symbols that every Piper voice has.")
    return read


def _parse(config: dict[str, Any], fallback_voice: str) -> PiperConfig:
    inference = config.get("inference", {})
    names = {int(number): str(name) for name, number in (config.get("speaker_id_map") or {}).items()}
    num_speakers = max(1, int(config.get("num_speakers", 1)))
    if num_speakers == 1:
        voices: tuple[str, ...] = (str(config.get("dataset") or fallback_voice),)
    else:
        voices = tuple(names.get(number, str(number)) for number in range(num_speakers))
    return PiperConfig(
        sample_rate_hz=int(config["audio"]["sample_rate"]),
        ids={str(phoneme): tuple(int(i) for i in ids) for phoneme, ids in config["phoneme_id_map"].items()},
        phonemes=str(config.get("phoneme_type") or "espeak"),
        espeak_voice=str(config["espeak"]["voice"]),
        clusters=tuple(tuple(map(str, cluster)) for cluster in config.get("vowel_clusters") or ()),
        voices=voices,
        scales=(
            float(inference.get("noise_scale", 0.667)),
            float(inference.get("length_scale", 1.0)),
            float(inference.get("noise_w", 0.8)),
        ),
        frame_samples=int(config.get("hop_length", 256)),
    )


class PiperVoice:
    """A voice in memory.

    Args:
        session: of onnxruntime.
        config: of the voice.
    """

    def __init__(self, session: Any, config: PiperConfig) -> None:
        self._session = session
        self._config = config
        self._has_speakers = any(wanted.name == "sid" for wanted in session.get_inputs())
        self._phonemizer = Phonemizer() if config.phonemes == "espeak" else None
        self.sample_rate_hz = config.sample_rate_hz
        self.frame_samples = config.frame_samples
        self.voices = config.voices

    def prepare(self) -> None:
        """Nothing: onnxruntime has threads of its own."""

    def read(self, text: str) -> list[Symbols]:
        """Return the symbols of each sentence; none of a sentence without a sound."""
        if self._phonemizer is None:
            sentences = [list(unicodedata.normalize("NFD", text))]
        else:
            sentences = self._phonemizer.sentences(self._config.espeak_voice, text, self._config.clusters)
        return [
            self._symbols(part)
            for sentence in sentences
            for part in _parts([phoneme for phoneme in sentence if phoneme in self._config.ids])
            if any(_is_sound(phoneme) for phoneme in part)
        ]

    def _symbols(self, phonemes: Sequence[str]) -> Symbols:
        ids, blank = self._config.ids, self._config.ids[_BLANK]
        symbols = [*ids[_BEGIN], *blank]
        for phoneme in phonemes:
            symbols += (*ids[phoneme], *blank)
        return (*symbols, *ids[_END])

    def speak(self, symbols: Symbols, voice: int, speed: float) -> Waveform:
        """Return sound (samples,) at full scale."""
        noise, length, noise_w = self._config.scales
        feeds = {
            "input": np.array([symbols], np.int64),
            "input_lengths": np.array([len(symbols)], np.int64),
            "scales": np.array([noise, length / speed, noise_w], np.float32),
        }
        if self._has_speakers:
            feeds["sid"] = np.array([voice], np.int64)
        waveform: Waveform = np.asarray(self._session.run(None, feeds)[0], np.float32).reshape(-1)
        loudest = float(np.abs(waveform).max(initial=0.0))
        return waveform / loudest if loudest > _SILENCE else waveform

    def close(self) -> None:
        """End the phonemizer, free the model."""
        self._session = None
        if self._phonemizer is not None:
            self._phonemizer.close()


def open_piper(spec: LoadSpec, onnx: Path) -> tuple[PiperVoice, int]:
    """Return a voice, and the bytes of its weights. Blocking: a second.

    Raises:
        ModelLoadFailed: it is none, or a package is missing.
    """
    config = read_config(onnx.with_name(onnx.name + ".json"), fallback_voice=spec.model.rpartition("/")[2])
    try:
        import onnxruntime
    except ImportError:
        raise ModelLoadFailed("Piper voices need onnxruntime: pip install 'hostler[piper]'.") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = spec.num_threads or max(1, len(os.sched_getaffinity(0)) - 1)
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # The arena would keep what the longest piece ever took: 150 MB more were seen, and no more speed.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    # Threads that spin while they wait take the cores that the gateway and other models need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = ["CPUExecutionProvider"]
    if spec.device.startswith("cuda") and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, "CUDAExecutionProvider")
    try:
        session = onnxruntime.InferenceSession(str(onnx), options, providers=providers)
    except Exception as error:  # onnxruntime's errors have no common class
        raise ModelLoadFailed(f"{onnx.name} cannot be loaded: {type(error).__name__}.") from error
    names = {wanted.name for wanted in session.get_inputs()}
    if names - {"sid"} != _INPUTS or (len(config.voices) > 1 and "sid" not in names):
        raise ModelLoadFailed(f"{onnx.name} is not a Piper voice: its inputs are {', '.join(sorted(names))[:200]}.")
    return PiperVoice(session, config), onnx.stat().st_size


def _parts(phonemes: list[str]) -> list[list[str]]:
    """Cut after blanks where there are more phonemes than one call may have."""
    parts = []
    while len(phonemes) > _MAX_PHONEMES:
        blanks = [at for at in range(_MAX_PHONEMES // 2, _MAX_PHONEMES) if phonemes[at] == " "]
        at = blanks[-1] + 1 if blanks else _MAX_PHONEMES
        parts.append(phonemes[:at])
        phonemes = phonemes[at:]
    return [*parts, phonemes]


def _is_sound(phoneme: str) -> bool:
    return any(unicodedata.category(c)[0] in "LN" for c in phoneme)
