"""Compiles the kernels with the system's C++ compiler, once for each processor, into a cache on disk.

Above: `decoder.py` loads the library; the engine starts a build in the background when there is none yet and serves
through transformers' own definitions meanwhile. `python -m workers.text.native.build` builds ahead of time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SOURCES = Path(__file__).parent
MAIN = "decoder.cpp"
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-pthread",
    "-fvisibility=hidden",  # else two builds in one process would share what is static in inline functions
)  # fmt: skip
_TIMEOUT_S = 600
_COMPILERS = ("c++", "g++", "clang++")


class CannotBuild(Exception):
    """There is no compiler, or it failed; the message says which and what to do."""


def kernels_dir() -> Path:
    """Return where compiled kernels are kept: $HOSTLER_KERNELS_DIR, else ~/.cache/hostler/kernels."""
    given = os.environ.get("HOSTLER_KERNELS_DIR")
    return Path(given) if given else Path.home() / ".cache" / "hostler" / "kernels"


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(next((x for x in lines if x.startswith(key)), "") for key in ("model name", "flags", "Features"))


def library_path(sources: Path = SOURCES) -> Path:
    """Return the place of the library for these sources, flags and this processor, built or not."""
    digest = hashlib.sha256(f"{platform.machine()}\n{_processor()}\n{' '.join(FLAGS)}\n".encode())
    for source in sorted(p for p in sources.iterdir() if p.suffix in (".h", ".cpp")):
        digest.update(source.name.encode() + source.read_bytes())
    return kernels_dir() / f"{digest.hexdigest()[:24]}.so"


def built() -> Path | None:
    """Return the library if it was built before, without building."""
    path = library_path()
    return path if path.is_file() else None


def build(sources: Path = SOURCES) -> Path:
    """Return the library, compiling it if need be: ten seconds or so, at low priority. Safe in several processes.

    Args:
        sources: another directory of them, to compare with these.

    Raises:
        CannotBuild: no compiler, or it failed.
    """
    path = library_path(sources)
    if path.is_file():
        return path
    if platform.system() != "Linux":
        raise CannotBuild(f"the kernels need Linux, and this is {platform.system()}.")
    compiler = os.environ.get("CXX") or next((c for c in _COMPILERS if shutil.which(c)), None)
    if compiler is None:
        raise CannotBuild("there is no C++ compiler here. Install one (Debian, Ubuntu: apt install g++).")
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_file():
            return path
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            command = [*_gently(), compiler, *FLAGS, str(sources / MAIN), "-o", str(made)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise CannotBuild(f"{compiler} could not be run ({type(error).__name__}).") from error
            if done.returncode:
                raise CannotBuild(f"{compiler} failed: {done.stderr.strip()[-500:]}")
            made.replace(path)
    return path


def _gently() -> list[str]:
    return ["nice", "-n", "10"] if shutil.which("nice") else []


def main() -> int:
    """Build and say so; without a compiler say what is lost. Always 0: nothing depends on it."""
    began = time.monotonic()
    try:
        path = build()
    except CannotBuild as error:
        sys.stdout.write(f"no CPU kernels: {error} hostler serves without them, more slowly.\n")
    else:
        sys.stdout.write(f"CPU kernels at {path} ({time.monotonic() - began:.0f} s)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
