"""Claude Code, installed once from npm, and run without anything of this user's: no settings, keys or history."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

PACKAGE = "@anthropic-ai/claude-code"
DIRECTORY = Path.home() / ".cache" / "hostler" / "node-claude-code"
INSTALL_WITHIN_S = 240


def installed() -> Path:
    """Return the program; skip the test where it cannot be had."""
    program = DIRECTORY / "node_modules" / ".bin" / "claude"
    if not program.exists():
        if shutil.which("npm") is None:
            pytest.skip("npm is not installed, so Claude Code cannot be")
        DIRECTORY.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--no-audit", "--no-fund", "--silent", PACKAGE]
        try:
            subprocess.run(command, cwd=DIRECTORY, check=True, timeout=INSTALL_WITHIN_S)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"Claude Code could not be installed: {error}")
    if subprocess.run([str(program), "--version"], capture_output=True, timeout=60, check=False).returncode:
        pytest.skip("Claude Code does not run on this machine")
    return program


def run(url: str, model: str, home: Path, *args: str, timeout_s: float = 240) -> dict[str, Any]:
    """Run `claude -p ARGS` against a server in the empty directory `home`; return the result that it prints as JSON."""
    work = home / "work"
    work.mkdir(parents=True, exist_ok=True)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "TERM": "dumb",
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_API_KEY": "none",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": model,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": "32768",
        "DISABLE_AUTOUPDATER": "1",
    }
    command = [str(installed()), "-p", *args, "--model", model, "--output-format", "json"]
    done = subprocess.run(
        command,
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.stdout.strip(), done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result
