"""Schemathesis against our own OpenAPI document: no 500, no status or content that the document does not tell.

Above: `make fuzz` (`__main__`), and the short form in tests/journeys. Below: schemathesis, as a command.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

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


def prepared(url: str, model: str) -> dict[str, Any]:
    """Return a server's document in which a body's model is mostly one that there is."""
    document: dict[str, Any] = httpx.get(f"{url}/openapi.json", timeout=30).json()
    document["components"]["schemas"]["ModelName"] = {"enum": [model, f"{model}@main", "nobody"]}
    return document


def command(document: Path, url: str, *, seconds: int, seed: int | None, phases: Sequence[str]) -> list[str]:
    """Return the command line of one run.

    Args:
        document: file with the OpenAPI document.
        url: root of a running server.
        seconds: for the whole run.
    """
    line = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", str(document)]
    line += ["--url", url, "--phases", ",".join(phases), "--checks", ",".join(CHECKS), "--max-time", str(seconds)]
    line += ["--request-timeout", "30", "--workers", "1", "--no-color", "--continue-on-failure"]
    for operation in ENDLESS:
        line += ["--exclude-operation-id", operation]
    return line if seed is None else [*line, "--seed", str(seed)]


def fuzz(
    url: str,
    *,
    model: str,
    seconds: int,
    seed: int | None = None,
    phases: Sequence[str] = ("coverage", "fuzzing", "stateful"),
) -> tuple[int, str]:
    """Run schemathesis; return its exit status, 0 only if every check held, and what it printed."""
    with tempfile.TemporaryDirectory(prefix="hostler-fuzz-") as directory:
        document = Path(directory, "openapi.json")
        document.write_text(json.dumps(prepared(url, model)), encoding="utf-8")
        line = command(document, url, seconds=seconds, seed=seed, phases=phases)
        done = subprocess.run(line, cwd=directory, capture_output=True, text=True, timeout=seconds + 300, check=False)
    return done.returncode, done.stdout + done.stderr
