"""Schemathesis against our own OpenAPI document: no 500, no status or content that the document does not tell.

Above: `make fuzz` (`__main__`), and the short form in tests/journeys. Below: schemathesis, as a command.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).with_name("schemathesis.toml")
# What is promised. Not among them: that every body which the schemas allow is accepted (fields may contradict one
# another, and a model may lack an ability), nor that each which they do not allow is refused (unknown fields are not).
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
)
# Follow streams for ever.
ENDLESS = ("get_admin_events",)


def command(url: str, *, seconds: int, seed: int | None, phases: Sequence[str]) -> list[str]:
    """Return the command line of one run.

    Args:
        url: root of a running server.
        seconds: for the whole run.
    """
    line = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", f"{url}/openapi.json"]
    line += ["--url", url, "--phases", ",".join(phases), "--checks", ",".join(CHECKS), "--max-time", str(seconds)]
    line += ["--request-timeout", "30", "--workers", "1", "--no-color", "--continue-on-failure"]
    for operation in ENDLESS:
        line += ["--exclude-operation-id", operation]
    return line if seed is None else [*line, "--seed", str(seed)]


def fuzz(
    url: str, *, seconds: int, seed: int | None = None, phases: Sequence[str] = ("coverage", "fuzzing", "stateful")
) -> subprocess.CompletedProcess[str]:
    """Run schemathesis; its exit status is 0 only if every check held."""
    line = command(url, seconds=seconds, seed=seed, phases=phases)
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=seconds + 300, check=False)
