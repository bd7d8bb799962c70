"""The peer `transformers serve`, one request at a time or with continuous batching, in an environment of its own.

Above: the lineup. Below: `environments`, and the peer's own command line.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.journeys.server import free_port

from .environments import Environment, Say, clean_environment
from .peers import Running, StoredModel, TreeServer

TRANSFORMERS = "5.23.0"


class TransformersServe:
    """`transformers serve` in bf16; the default mode serves streams one after the other.

    With continuous batching its cache is sized for 16 streams of 256 tokens and a little more: by default it takes
    0.8 of the memory, and since its attention on a CPU masks the whole cache, a larger cache would also make it
    slower. Sampling is then fixed by the first request, so the first one is greedy as all others are.
    """

    start_within_s = 180.0

    def __init__(
        self, model: StoredModel, threads: int, *, continuous: bool, num_blocks: int = 160, block_size: int = 32
    ) -> None:
        self._model = model
        self._threads = threads
        self._continuous = continuous
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._environment = Environment("transformers-serve")

    @property
    def name(self) -> str:
        """Its name in notices."""
        return "transformers serve (continuous batching)" if self._continuous else "transformers serve (default)"

    @property
    def short(self) -> str:
        """Its name as a column."""
        return "transformers-cb" if self._continuous else "transformers"

    @property
    def max_streams(self) -> int | None:
        """One stream without batching: more would only wait in line."""
        return None if self._continuous else 1

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that one decode step reads."""
        return self._model.weight_bytes

    def prepare(self, say: Say) -> None:
        """Build the environment if it is not there. Raises Skip when pip could not."""
        torch = version("torch")

        def build() -> None:
            self._environment.make_venv()
            self._environment.pip(f"torch=={torch}")
            self._environment.pip(f"torch=={torch}", f"transformers[serving]=={TRANSFORMERS}", "python-multipart")

        recipe = f"{sys.version.split()[0]} torch=={torch} transformers=={TRANSFORMERS}"
        announce = "building the environment of transformers serve (once, one to two minutes)"
        self._environment.ensure(recipe, build, say, announce)

    def command(self, port: int, *, pinned: bool = True) -> list[str]:
        """Return the command line that serves on `port`; not `pinned`, it loads whatever it is asked for."""
        options = {"--dtype": "bfloat16", "--device": "cpu", "--host": "127.0.0.1", "--port": port}
        batching = {
            "--cb-num-blocks": self._num_blocks,
            "--cb-block-size": self._block_size,
            "--cb-max-batch-tokens": 1024,
        }
        flags = [str(part) for pair in (options | (batching if self._continuous else {})).items() for part in pair]
        program = [str(self._environment.directory / "bin/transformers"), "serve"]
        program += [str(self._model.path)] if pinned else []
        return [*program, *(["--continuous-batching"] if self._continuous else []), *flags]

    def start(self, *, pinned: bool = True) -> Running:
        """Start it; returns at once."""
        port = free_port()
        environment = clean_environment(
            OMP_NUM_THREADS=str(self._threads), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false"
        )
        directory = Path(tempfile.mkdtemp(prefix="hb-", dir="/tmp"))
        return TreeServer.spawn(self.command(port, pinned=pinned), environment, port, directory)

    def body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        """Return a chat request; it has no `ignore_eos`, but an end token that never comes is the same."""
        generation = {"max_new_tokens": max_tokens, "do_sample": False, "eos_token_id": -1}
        return {
            "model": str(self._model.path),
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "generation_config": json.dumps(generation),
        }
