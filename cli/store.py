"""The model store as the command line uses it: `python -m orchestrator.store …` in a process of its own.

Above stand `cli.control`'s pull, rm and models; below, another room, which we do not import: we read the JSON
lines that it prints.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cli.exits import CliError


def _command(*arguments: str, models_dir: Path | None) -> list[str]:
    where = ["--models-dir", str(models_dir)] if models_dir else []
    return [sys.executable, "-P", "-m", "orchestrator.store", *arguments, *where]


def _failure(stderr: str, what: str) -> CliError:
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    if any("No module named" in line for line in lines):
        return CliError(f"{what} needs the orchestrator's packages: pip install 'hostler[orchestrator]' ({lines[-1]})")
    return CliError(f"{what} failed" + (f": {lines[-1]}" if lines else ""))


def _json_line(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None  # a library printed something of its own
    return value if isinstance(value, dict) else None


def pull(name: str, revision: str | None, models_dir: Path | None) -> Iterator[dict[str, Any]]:
    """Yield the store's progress objects; the last has stage "done" or "error".

    Raises:
        CliError: the store could not run, or ended without a last word.
    """
    arguments = ["pull", name, *(["--revision", revision] if revision else []), "--json"]
    last = ""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
        process = subprocess.Popen(
            _command(*arguments, models_dir=models_dir), stdout=subprocess.PIPE, stderr=complaints, text=True
        )
        try:
            for line in process.stdout or ():
                if (event := _json_line(line)) is not None:
                    last = str(event.get("stage", ""))
                    yield event
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if last not in ("done", "error"):
            complaints.seek(0)
            raise _failure(complaints.read(), "pull")


def listing(models_dir: Path | None) -> list[dict[str, Any]]:
    """Return what is on disk: name, path, source, revision, bytes, created_unix_s."""
    done = _run(["list", "--json"], models_dir, "listing models")
    try:
        values = json.loads(done.stdout)
    except ValueError:
        raise CliError("listing models failed: the store did not answer with JSON") from None
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def remove(name: str, models_dir: Path | None) -> None:
    """Delete a model from disk."""
    _run(["remove", name, "--json"], models_dir, f"removing {name}")


def _run(arguments: Sequence[str], models_dir: Path | None, what: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        _command(*arguments, models_dir=models_dir), capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        for line in reversed(done.stdout.splitlines()):
            if (event := _json_line(line)) is not None and event.get("message"):
                raise CliError(str(event["message"]))
        raise _failure(done.stderr, what)
    return done
