"""How far a load is, in words: the comment that a waiting stream shows. Above: routes; below: `sse`."""

from __future__ import annotations

from hostler.placement.v1 import placement_pb2 as pb
from hostler.words import duration, size, stage

from gateway.sse import comment_frame


def progress_words(progress: pb.EnsureProgress) -> str:
    """Return one line: stage, place in the queue, share of the bytes, detail, expected time."""
    words = stage(progress.stage)
    if progress.total_bytes:
        percent = min(100, 100 * progress.done_bytes // progress.total_bytes)
        words += f" {percent}% of {size(progress.total_bytes)}"
    parts = [words]
    if progress.num_ahead:
        parts.append("1 model ahead" if progress.num_ahead == 1 else f"{progress.num_ahead} models ahead")
    if progress.detail:
        parts.append(progress.detail)
    if progress.eta_ms:
        parts.append(f"about {duration(progress.eta_ms / 1000)} left")
    return ", ".join(parts)


def loading_comment(progress: pb.EnsureProgress) -> bytes:
    """Return the comment that tells a person with curl what the wait is for."""
    return comment_frame(f"loading: {progress_words(progress)}")
