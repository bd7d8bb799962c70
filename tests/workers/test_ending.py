"""A worker whose GPU answers nothing any more ends, so that another takes its place."""

from __future__ import annotations

import pytest
import torch

from workers import ending


@pytest.mark.parametrize("state", ["no GPU in use", "one that works", "one that is lost"])
def test_a_worker_ends_with_its_gpu_and_only_with_it(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize() -> None:
        if state == "one that is lost":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    reasons: list[str] = []
    monkeypatch.setattr(ending, "end_process", reasons.append)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: state != "no GPU in use")
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    ending.end_if_device_is_lost()
    expected = ["the GPU answers nothing any more: CUDA"] if state == "one that is lost" else []
    assert [reason[:38] for reason in reasons] == expected
