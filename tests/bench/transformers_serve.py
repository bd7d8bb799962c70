"""The peer `transformers serve --continuous-batching`, in an environment of its own, built once and kept.

Above: the run (`__main__`). Below: pip, and the peer's own command line.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.journeys.server import free_port

from .peers import Running, Skip, TreeServer

TRANSFORMERS = "5.23.0"
ENVIRONMENT = Path.home() / ".cache/hostler/bench/transformers-serve"
PIP_WITHIN_S = 600


class TransformersServe:
    """`transformers serve` with continuous batching; tuned so that it runs well within a few GiB.

    Its cache is sized for 16 streams of 256 tokens and a little more: by default it takes 0.8 of the memory,
    and since its attention on a CPU masks the whole cache, a larger cache would also make it slower.
    Sampling is fixed by its first request, so the first one is greedy as all others are.
    """

    name = "transformers serve (continuous batching)"
    short = "transformers"

    def __init__(self, model_path: Path, threads: int, num_blocks: int = 160, block_size: int = 32) -> None:
        self._model_path = model_path
        self._threads = threads
        self._num_blocks = num_blocks
        self._block_size = block_size

    def prepare(self, say: Callable[[str], None]) -> None:
        """Build the environment if it is not there.

        Raises:
            Skip: pip could not, with its last line.
        """
        stamp = ENVIRONMENT / "ready"
        torch = version("torch")
        wanted = f"{sys.version.split()[0]} torch=={torch} transformers=={TRANSFORMERS}"
        if stamp.is_file() and stamp.read_text() == wanted:
            return
        say(f"building the environment of {self.name} (once, one to two minutes) in {ENVIRONMENT}")
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        ENVIRONMENT.parent.mkdir(parents=True, exist_ok=True)
        pip = [str(ENVIRONMENT / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        serving = f"transformers[serving]=={TRANSFORMERS}"
        steps = [
            [sys.executable, "-m", "venv", str(ENVIRONMENT)],
            [*pip, f"torch=={torch}"],
            [*pip, f"torch=={torch}", serving, "python-multipart"],
        ]
        for step in steps:
            try:
                subprocess.run(step, check=True, capture_output=True, text=True, timeout=PIP_WITHIN_S)
            except (subprocess.SubprocessError, OSError) as error:
                output = str(getattr(error, "stderr", "") or error).strip()
                shutil.rmtree(ENVIRONMENT, ignore_errors=True)
                raise Skip(f"it could not be installed: {output.splitlines()[-1] if output else error}") from None
        stamp.write_text(wanted)

    def command(self, port: int) -> list[str]:
        """Return the command line that serves on `port`."""
        options = {
            "--cb-num-blocks": self._num_blocks,
            "--cb-block-size": self._block_size,
            "--cb-max-batch-tokens": 1024,
            "--dtype": "bfloat16",
            "--device": "cpu",
            "--host": "127.0.0.1",
            "--port": port,
        }
        flags = [str(part) for pair in options.items() for part in pair]
        return [str(ENVIRONMENT / "bin/transformers"), "serve", str(self._model_path), "--continuous-batching", *flags]

    def start(self) -> Running:
        """Start it; returns at once."""
        port = free_port()
        directory = Path(tempfile.mkdtemp(prefix="hb-", dir="/tmp"))
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("VIRTUAL_ENV", "PYTHON"))},
            "OMP_NUM_THREADS": str(self._threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        return TreeServer.spawn(self.command(port), environment, port, directory)

    def body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        """Return a chat request; it has no `ignore_eos`, but an end token that never comes is the same."""
        generation = {"max_new_tokens": max_tokens, "do_sample": False, "eos_token_id": -1}
        return {
            "model": str(self._model_path),
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "generation_config": json.dumps(generation),
        }
