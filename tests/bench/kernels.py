"""Two versions of the CPU kernels side by side, step by step: `python -m tests.bench.kernels --against HEAD`.

Above: whoever changes a kernel. Below: the kernels of the working tree and those of a commit, each packing the same
model. Versions take turns within a round, so a machine that slows down slows both; medians and the ratio of neighbours
are printed. Where a step's time goes is by the kernels' own account.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.journeys.server import ROOT
from workers.engine import LoadSpec
from workers.text.describe import describe
from workers.text.kv_cache import blocks_for
from workers.text.loader import load
from workers.text.native import build
from workers.text.native.decoder import STAGES, NativeDecoder

from .peers import Skip, pull

MODEL = "SmolLM2-135M-Instruct"
PROMPT_TOKENS = 88
CONTEXT_TOKENS = 150
_SOURCES = build.SOURCES.relative_to(ROOT)
_WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Load:
    """One step: so many sequences, each with so many rows after `start` positions.

    Attributes:
        rows: of each sequence.
        start: positions that each has in the cache already.
    """

    name: str
    rows: tuple[int, ...]
    start: int

    @classmethod
    def decode(cls, count: int) -> Load:
        """Return a step in which `count` sequences get one token each."""
        return cls(f"{count} rows", (1,) * count, CONTEXT_TOKENS)

    @classmethod
    def prefill(cls, total: int) -> Load:
        """Return a step that takes in `total` prompt tokens: prompts of 88, the last one what is left."""
        whole, rest = divmod(total, PROMPT_TOKENS)
        return cls(f"prompts of {total}", (PROMPT_TOKENS,) * whole + ((rest,) if rest else ()), 0)


@dataclass
class Version:
    """One version's packed model, and what its steps took, in seconds."""

    name: str
    decoder: NativeDecoder
    vocab: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    parts: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def run(self, load_: Load, num_threads: int, keep: bool) -> None:
        """Run one step, and remember what it took if asked to."""
        total, stride = sum(load_.rows), blocks_for(load_.start + max(load_.rows))
        firsts = np.cumsum((0, *load_.rows[:-1]))
        sequences = [
            (first, rows, load_.start, i) for i, (first, rows) in enumerate(zip(firsts, load_.rows, strict=True))
        ]
        tables = np.arange(len(load_.rows) * stride, dtype=np.int32).reshape(-1, stride)
        tokens = np.random.default_rng(0).integers(0, self.vocab, total).astype(np.int32)
        positions = np.concatenate([np.arange(load_.start, load_.start + rows) for rows in load_.rows]).astype(np.int32)
        self.decoder.seconds()
        began_s = time.perf_counter()
        self.decoder.step(
            tokens=tokens, positions=positions, sequences=np.asarray(sequences, np.int32), tables=tables,
            logit_rows=(firsts + np.asarray(load_.rows) - 1).astype(np.int32), num_threads=num_threads,
        )  # fmt: skip
        spent_s = time.perf_counter() - began_s
        if keep:
            self.seconds.setdefault(load_.name, []).append(spent_s)
            self.parts.setdefault(load_.name, []).append(self.decoder.seconds())


@contextlib.contextmanager
def sources_of(revision: str) -> Iterator[Path]:
    """Give the kernels' sources as they are in a commit.

    Raises:
        Skip: there is no such commit, or no git.
    """
    done = subprocess.run(["git", "archive", revision, str(_SOURCES)], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        raise Skip(f"no kernels of {revision}: {done.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory(prefix="hostler-kernels-") as scratch:
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            archive.extractall(scratch, filter="data")
        yield Path(scratch) / _SOURCES


def packed(name: str, library: Path, path: Path, weights: str, num_threads: int, loads: list[Load]) -> Version:
    """Return the model packed by one version of the kernels, with a cache that holds any of the loads."""
    loaded = load(LoadSpec(name, str(path), dtype="bfloat16"), lambda *_: None)
    description = describe(loaded.decoder, loaded.head, loaded.text_config)
    if description is None:
        raise Skip("the kernels do not know this model's family.")
    num_blocks = max(len(x.rows) * blocks_for(x.start + max(x.rows)) for x in loads)
    decoder = NativeDecoder(
        library, description, weights=weights, cache="bfloat16", num_blocks=num_blocks, num_threads=num_threads
    )
    # Positions that no step of ours has written are zeros then, as good as any.
    return Version(name, decoder, description.vocab)


def shown(versions: list[Version], loads: list[Load], title: str) -> Table:
    """Return the table of medians, in milliseconds."""
    table = Table(title=title)
    for column in ("step", "version", "ms", *STAGES, "of the first"):
        table.add_column(column, justify="left" if column in ("step", "version") else "right")
    for load_ in loads:
        for version in versions:
            spent = version.seconds[load_.name]
            ratio = statistics.median(a / b for a, b in zip(spent, versions[0].seconds[load_.name], strict=True))
            table.add_row(
                load_.name,
                version.name,
                f"{statistics.median(spent) * 1e3:.2f}",
                *(f"{statistics.median(p[stage] for p in version.parts[load_.name]) * 1e3:.2f}" for stage in STAGES),
                "" if version is versions[0] else f"{ratio:.3f}",
            )
        table.add_section()
    return table


def main() -> int:
    """Build, measure, print; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--against", action="append", default=[], metavar="COMMIT", help="versions to compare with")
    parser.add_argument("--rows", default="1,16", help="sequences of decode steps (default 1,16)")
    parser.add_argument("--prompts", default="90,512", help="prompt tokens of prefill steps (default 90,512)")
    parser.add_argument("--weights", default="bfloat16", help="float32, bfloat16, int8 or int4 (default bfloat16)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--model", default=MODEL, help=f"catalog name (default {MODEL})")
    chosen = parser.parse_args()
    console = Console()
    loads = [Load.decode(int(n)) for n in chosen.rows.split(",") if n]
    loads += [Load.prefill(int(n)) for n in chosen.prompts.split(",") if n]
    try:
        model = pull(chosen.model, console.print)
        with contextlib.ExitStack() as stack:
            sources = {"working tree": build.SOURCES}
            sources |= {commit: stack.enter_context(sources_of(commit)) for commit in chosen.against}
            libraries = {name: build.build(place) for name, place in reversed(sources.items())}
        versions = [
            packed(name, library, model.path, chosen.weights, chosen.threads, loads)
            for name, library in libraries.items()
        ]
    except (Skip, build.CannotBuild) as reason:
        console.print(str(reason), style="red", markup=False)
        return 1
    for number in range(-_WARM_UP, chosen.rounds):
        for load_ in loads:
            for version in versions:
                version.run(load_, chosen.threads, keep=number >= 0)
    title = f"{chosen.model}, {chosen.weights}, {chosen.threads} threads, {chosen.rounds} rounds"
    console.print(shown(versions, loads, title))
    return 0


if __name__ == "__main__":
    sys.exit(main())
