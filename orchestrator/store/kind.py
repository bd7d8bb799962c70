"""What a model's directory is for: text, embeddings, ranking, hearing, speaking. Pure but for reading files.

Above it: the orchestrator, when it has located a model. Below it: `config.json` and, of sentence-transformers,
`modules.json` and `config_sentence_transformers.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from orchestrator.store.footprint import read_json
from orchestrator.store.piper import voice_file

Kind = Literal["text", "embedding", "rerank", "transcription", "speech"]

_MODULES = "modules.json"
_SENTENCE_TRANSFORMERS = "config_sentence_transformers.json"
_SCORES = "ForSequenceClassification"
_HEARS = ("ForCTC", "ForSpeechSeq2Seq", "ForSpeechToText", "ForRNNT", "ForTDT")
_SPEAKS = frozenset(
    {"vits", "speecht5", "bark", "csm", "dia", "fastspeech2_conformer", "fastspeech2_conformer_with_hifigan"}
    | {"gradium_phonon_tts", "higgs_audio_v2", "parler_tts", "pocket_tts", "vibevoice"}
)
"""Model types that do nothing but speak. Their engine says which it serves."""
# Their last words in `architectures`: whole encoders and decoders without a head, and heads that embeddings do not use.
_HEADLESS = ("Model", "EncoderModel", "ForMaskedLM")


def kind_of(path: Path) -> Kind:
    """Return what the model in directory `path` is for.

    A Piper voice speaks, and so does what transformers made for nothing else. Whisper and other recognisers of speech
    write it down. A classifier with one label ranks documents. Whatever sentence-transformers lists modules for, and an
    encoder without a head that writes, makes embeddings. Everything else writes text.

    Raises:
        ModelLoadFailed: config.json is missing or damaged.
    """
    if voice_file(path) is not None:
        return "speech"
    config = read_json(path / "config.json")
    if config.get("model_type") in _SPEAKS and not _listens(config):
        return "speech"
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if config.get("model_type") == "whisper" or architecture.endswith(_HEARS):
        return "transcription"
    if architecture.endswith(_SCORES):
        return "rerank" if _num_labels(config) == 1 else "text"
    if (path / _MODULES).is_file():
        return "embedding"
    if (path / _SENTENCE_TRANSFORMERS).is_file() and not architecture.endswith("ForCausalLM"):
        return "embedding"
    return "embedding" if architecture.endswith(_HEADLESS) else "text"


def _listens(config: dict[str, Any]) -> bool:
    """SpeechT5 is one family for both ways."""
    return any(str(name).endswith("ForSpeechToText") for name in config.get("architectures") or ())


def _num_labels(config: dict[str, Any]) -> int:
    labels = config.get("id2label")
    if isinstance(labels, dict):
        return len(labels)
    return int(config.get("num_labels", 2))
