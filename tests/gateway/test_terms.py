"""`keep_alive` as Ollama writes it, `service_tier` as OpenAI does, and where both of them go."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from hostler.errors import InvalidRequest
from hostler.placement.v1 import placement_pb2

from gateway.fields import Fields
from gateway.terms import FOREVER_MS, read_keep_alive_ms
from tests.gateway.fakes import World, route


@pytest.mark.parametrize(
    ("value", "milliseconds"),
    [
        ("5m", 300_000),
        ("1h30m", 5_400_000),
        ("1.5h", 5_400_000),
        ("500ms", 500),
        ("10us", 1),
        ("300", 300_000),
        (" 2s ", 2000),
        ("0", 0),
        ("0s", 0),
        (0, 0),
        (30, 30_000),
        (0.25, 250),
        (-1, FOREVER_MS),
        (-0.5, FOREVER_MS),
        ("-1", FOREVER_MS),
        ("-1m", FOREVER_MS),
        (-(10**400), FOREVER_MS),
        (None, None),
    ],
)
def test_a_keep_alive_is_seconds_or_a_go_duration_and_negative_is_for_ever(
    value: Any, milliseconds: int | None
) -> None:
    assert read_keep_alive_ms(Fields({"keep_alive": value})) == milliseconds


@pytest.mark.parametrize(
    "value",
    [
        "",
        "soon",
        "5 m",
        "5x",
        "m5",
        "1h-30m",
        "٣s",
        "1e3s",
        "inf",
        "9" * 400 + "h",
        "9" * 18 + "h",
        True,
        [],
        {},
        10**9,
        "40000h",
        10**400,
    ],
)
def test_any_other_keep_alive_is_refused_by_name(value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_keep_alive_ms(Fields({"keep_alive": value}))
    assert caught.value.param == "keep_alive"


async def test_keep_alive_and_flex_reach_the_worker(called: World) -> None:
    await called.chat("x", keep_alive="5m", service_tier="flex")
    await called.chat("x", service_tier="auto")
    patient, usual = called.worker.requests
    assert (patient.keep_alive_ms, patient.batch) == (300_000, True)
    assert (usual.HasField("keep_alive_ms"), usual.batch) == (False, False)
    for field in ("keep_alive", "service_tier"):
        reply = await called.chat("x", **{field: "gold"})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)


async def test_flex_waits_for_a_model_behind_everybody(called: World) -> None:
    async def load(model: str) -> AsyncIterator[placement_pb2.Replica]:
        yield called.worker.replica()

    called.placement.ensure = load
    await called.publish(route())
    await called.chat("x", service_tier="flex")
    await called.chat("x")
    assert called.placement.priorities == [placement_pb2.PRIORITY_BATCH, placement_pb2.PRIORITY_UNSPECIFIED]
