"""Which engine runs which kind of model. Each is imported only by a process that needs it: some take seconds.

Above: `host.py`. Below: the engines' own openings.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from hostler.lifecycle.v1 import lifecycle_pb2 as life

from workers.engine import Engine, LoadSpec

Report = Callable[[str, int, int], None]
Opener = Callable[[LoadSpec, Report], Awaitable[Engine]]


def _import_text_engine() -> Opener:
    """Import torch and transformers (seconds, in a thread) and return the text engine's opener."""
    from workers.text.opening import open_text_engine

    return open_text_engine


def _import_embedding_engine() -> Opener:
    from workers.embedding.opening import open_embedding_engine

    return open_embedding_engine


def _import_rerank_engine() -> Opener:
    from workers.embedding.opening import open_rerank_engine

    return open_rerank_engine


def _import_hearing_engine() -> Opener:
    from workers.hearing.opening import open_hearing_engine

    return open_hearing_engine


def _import_speaking_engine() -> Opener:
    from workers.speaking.opening import open_speaking_engine

    return open_speaking_engine


IMPORTS: dict[life.EngineKind.ValueType, Callable[[], Opener]] = {
    life.ENGINE_KIND_UNSPECIFIED: _import_text_engine,
    life.ENGINE_KIND_TEXT: _import_text_engine,
    life.ENGINE_KIND_EMBEDDING: _import_embedding_engine,
    life.ENGINE_KIND_RERANK: _import_rerank_engine,
    life.ENGINE_KIND_TRANSCRIPTION: _import_hearing_engine,
    life.ENGINE_KIND_SPEECH: _import_speaking_engine,
}
