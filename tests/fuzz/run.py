"""Schemathesis against our own OpenAPI document: no 500, no status or content that the document does not tell.

Above: `make fuzz` (`__main__`), and the short form in tests/journeys. Below: schemathesis, as a command.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
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
# Paths, by their beginnings. Events may be followed for ever.
ENDLESS = ("/admin/events",)


@dataclass(frozen=True, slots=True)
class Bound:
    """When a run is enough: after so many seconds, or after so many examples of each operation."""

    seconds: int = 0
    num_examples: int = 0

    def options(self) -> list[str]:
        """Return schemathesis' options for it."""
        by_time = ["--max-time", str(self.seconds)] if self.seconds else []
        return by_time + (["--max-examples", str(self.num_examples)] if self.num_examples else [])


def prepared(url: str, model: str) -> dict[str, Any]:
    """Return a server's document in which a body's model is mostly one that there is."""
    document: dict[str, Any] = httpx.get(f"{url}/openapi.json", timeout=30).json()
    document["components"]["schemas"]["ModelName"] = {"enum": [model, f"{model}@main", "nobody"]}
    return document


def command(
    document: Path, url: str, *, bound: Bound, seed: int | None, phases: Sequence[str], left_out: Sequence[str]
) -> list[str]:
    """Return the command line of one run.

    Args:
        document: file with the OpenAPI document.
        url: root of a running server.
        bound: when it is enough.
        left_out: beginnings of paths that are not asked.
    """
    line = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", str(document)]
    line += ["--url", url, "--phases", ",".join(phases), "--checks", ",".join(CHECKS), *bound.options()]
    line += ["--request-timeout", "30", "--workers", "1", "--no-color", "--continue-on-failure"]
    line += ["--exclude-path-regex", f"^({'|'.join(left_out)})"]
    return line if seed is None else [*line, "--seed", str(seed)]


def fuzz(
    url: str,
    *,
    model: str,
    bound: Bound,
    seed: int | None = None,
    phases: Sequence[str] = ("coverage", "fuzzing", "stateful"),
    left_out: Sequence[str] = ENDLESS,
) -> tuple[int, str]:
    """Run schemathesis; return its exit status, 0 only if every check held, and what it printed."""
    with tempfile.TemporaryDirectory(prefix="hostler-fuzz-") as directory:
        document = Path(directory, "openapi.json")
        document.write_text(json.dumps(prepared(url, model)), encoding="utf-8")
        line = command(document, url, bound=bound, seed=seed, phases=phases, left_out=left_out)
        done = subprocess.run(
            line, cwd=directory, capture_output=True, text=True, timeout=bound.seconds + 300, check=False
        )
    return done.returncode, done.stdout + done.stderr
