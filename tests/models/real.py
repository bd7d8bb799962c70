"""Real models that the store has short names for, for tests marked `real_model`. Below it: the model store."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
_TIMEOUT_S = 600


EMBEDDING_MODEL = "all-MiniLM-L6-v2"
VOICE = "piper-joe"


def smollm2() -> Path:
    """Return the directory of SmolLM2-135M-Instruct, as `pulled`."""
    return pulled(DEFAULT_MODEL)


def minilm() -> Path:
    """Return the directory of all-MiniLM-L6-v2, as `pulled`."""
    return pulled(EMBEDDING_MODEL)


def piper_joe() -> Path:
    """Return the directory of the Piper voice "joe", as `pulled`."""
    return pulled(VOICE)


def pulled(name: str) -> Path:
    """Return a model's directory in the user's own store, pulling it first if need be.

    Goes through the store's command line, as `hostler serve` does.

    Raises:
        RuntimeError: with the store's own sentence.
    """
    command = [sys.executable, "-m", "orchestrator.store", "pull", name, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    lines = done.stdout.strip().splitlines()
    last = json.loads(lines[-1]) if lines else {"stage": "error", "message": done.stderr[-500:]}
    if last["stage"] != "done":
        raise RuntimeError(f"{name} could not be had: {last['message']}")
    return Path(last["path"])
