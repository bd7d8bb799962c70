"""What the orchestrator's log says of a wait, whoever hangs up when."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from hostler.placement.v1 import placement_pb2 as pb

from orchestrator.service import PlacementService


class TwoEvents:
    """Stands for the scheduler: one word of progress, then the replica."""

    async def ensure(self, model: str, **_: Any) -> AsyncIterator[pb.EnsureModelResponse]:
        yield pb.EnsureModelResponse(progress=pb.EnsureProgress(detail=f"loading {model}"))
        yield pb.EnsureModelResponse(ready=pb.Replica())


class Caller:
    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()


@pytest.mark.parametrize(("num_read", "outcome"), [(1, "gone"), (2, "ready"), (3, "ready")])
async def test_a_caller_that_has_read_the_replica_had_what_it_asked_for(
    num_read: int, outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "orchestrator.service")
    service = PlacementService(TwoEvents())  # type: ignore[arg-type]
    answers = service.EnsureModel(pb.EnsureModelRequest(model="one"), Caller())  # type: ignore[arg-type]
    for _ in range(num_read):
        await anext(answers, None)
    await answers.aclose()  # type: ignore[attr-defined]
    [told] = caplog.records
    assert told.__dict__["outcome"] == outcome
