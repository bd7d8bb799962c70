"""What a model's directory is for: text, embeddings, ranking documents, hearing. Pure but for reading files.

Above it: the orchestrator, when it has located a model. Below it: `config.json` and, of sentence-transformers,
`modules.json` and `config_sentence_transformers.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from orchestrator.store.footprint import read_json

Kind = Literal["text", "embedding", "rerank", "transcription"]

_MODULES = "modules.json"
_SENTENCE_TRANSFORMERS = "config_sentence_transformers.json"
_SCORES = "ForSequenceClassification"
# Their last words in `architectures`: whole encoders and decoders without a head, and heads that embeddings do not use.
_HEARS = ("ForCTC", "ForSpeechSeq2Seq", "ForSpeechToText", "ForRNNT", "ForTDT")
_HEADLESS = ("Model", "EncoderModel", "ForMaskedLM")


def kind_of(path: Path) -> Kind:
    """Return what the model in directory `path` is for.

    Whisper and other recognisers of speech write it down.
    A classifier with one label ranks documents. Whatever sentence-transformers lists modules for, and an encoder
    without a head that writes, makes embeddings. Everything else writes text.

    Raises:
        ModelLoadFailed: config.json is missing or damaged.
    """
    config = read_json(path / "config.json")
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


def _num_labels(config: dict[str, Any]) -> int:
    labels = config.get("id2label")
    if isinstance(labels, dict):
        return len(labels)
    return int(config.get("num_labels", 2))
