"""Shared by every test: the fixtures of each area, and the server's logs in the report of a failed journey."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from hypothesis import HealthCheck, settings

# Each test has an event loop of its own. Without this reference gRPC stops its poller thread whenever the last object
# of a test is collected, and joining that thread from within the collector can hang.
grpc.aio.init_grpc_aio()

# How long an example takes says more about the machine than about the code.
settings.register_profile("hostler", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hostler")

# Some tests hang up on what they start, and a signal that `nohup` has this run ignore would be ignored by that, too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

pytest_plugins = [
    name
    for name in ("tests.journeys.server", "tests.models.fixtures")
    if (Path(__file__).parent.parent / Path(*name.split(".")).with_suffix(".py")).exists()
]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Add the tail of every log of the servers that a failed test used."""
    report: Any = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            if callable(sections := getattr(value, "log_sections", None)):
                report.sections.extend(sections())
    return report


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the text engine's own tests run on another device."""
    parser.addoption(
        "--device",
        default="cpu",
        help="where engines of tests are opened (default cpu); with another, only tests that open engines there run",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where torch finds none; leave out what another device has no part in."""
    if config.getoption("--device") != "cpu":
        elsewhere = [item for item in items if _opens_on_device(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in elsewhere])
        items[:] = elsewhere
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and not _has_cuda():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _opens_on_device(item: pytest.Item) -> bool:
    """Whether a test opens its engines on the chosen device; the compiled kernels are the CPU's alone."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return "engine_device" in getattr(item, "fixturenames", ()) and parameters.get("runner_name") != "native"


def _has_cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()
