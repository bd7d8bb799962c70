"""A process told from a later one of the same number, and ended without its help. Real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from orchestrator.process_id import ProcessId


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def known(process: subprocess.Popen[bytes]) -> ProcessId:
    found = ProcessId.of(process.pid)
    assert found is not None
    return found


def test_a_frozen_process_is_ended(child: subprocess.Popen[bytes]) -> None:
    os.kill(child.pid, signal.SIGSTOP)
    assert known(child).end(timeout_s=10)
    assert child.wait(10) == -signal.SIGKILL


def test_a_later_process_of_the_same_number_is_left_alone(child: subprocess.Popen[bytes]) -> None:
    earlier = replace(known(child), start_ticks=known(child).start_ticks - 1)
    assert not earlier.is_alive
    assert earlier.end(timeout_s=10)
    assert child.poll() is None


def test_a_process_that_only_waits_to_be_collected_has_ended(child: subprocess.Popen[bytes]) -> None:
    identity = known(child)
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not identity.is_alive
    assert identity.wait(timeout_s=0)


def test_waiting_for_a_living_process_ends_at_the_deadline(child: subprocess.Popen[bytes]) -> None:
    assert not known(child).wait(timeout_s=0.01)
    assert known(child).is_alive


def test_a_number_that_nobody_has_is_no_process(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait(10)
    assert ProcessId.of(child.pid) is None
