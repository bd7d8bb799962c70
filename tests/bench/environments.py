"""Where peers live: a directory each under ~/.cache/hostler/bench, built once, rebuilt when its recipe changes.

Above: the peers. Below: pip, cmake and whatever else a recipe runs, each as a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .peers import Skip

CACHE = Path.home() / ".cache/hostler/bench"
STEP_WITHIN_S = 1800
_LAST_CHARACTERS = 300

Say = Callable[[str], None]


def clean_environment(**more: str) -> dict[str, str]:
    """Return this process's environment without what would lead a peer to our own packages, and with `more`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("VIRTUAL_ENV", "PYTHON"))}
    return {**kept, **more}


def run_step(command: Sequence[str], environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run one step of a recipe and return what it printed.

    Raises:
        Skip: it failed or took longer than `STEP_WITHIN_S`; the message ends with the last line of its output.
    """
    try:
        done = subprocess.run(
            list(command),
            check=True,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=STEP_WITHIN_S,
            env=dict(environment) if environment is not None else clean_environment(),
            cwd=cwd,
        )
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout or "").strip().splitlines()
        said = lines[-1][-_LAST_CHARACTERS:] if lines else f"status {error.returncode}"
        raise Skip(f"`{Path(command[0]).name} {' '.join(command[1:4])} …` failed: {said}") from None
    except (subprocess.TimeoutExpired, OSError) as error:
        raise Skip(f"`{Path(command[0]).name} {' '.join(command[1:4])} …` failed: {error}") from None
    return done.stdout


def need(*programs: str) -> None:
    """Raise Skip unless every program is on the path."""
    if missing := [program for program in programs if shutil.which(program) is None]:
        raise Skip(f"it is built from source, which needs {' and '.join(missing)}")


class Environment:
    """One directory that a recipe fills. `ready` holds the recipe's own description, so that a new one rebuilds it."""

    def __init__(self, name: str, root: Path = CACHE) -> None:
        self.directory = root / name

    @property
    def python(self) -> Path:
        """The interpreter of its virtual environment, if the recipe makes one."""
        return self.directory / "bin/python"

    def holds(self, recipe: str) -> bool:
        """Return whether `recipe` was carried out here to its end."""
        stamp = self.directory / "ready"
        return stamp.is_file() and stamp.read_text(encoding="utf-8") == recipe

    def ensure(self, recipe: str, build: Callable[[], None], say: Say, announce: str) -> None:
        """Empty the directory and run `build` unless it holds `recipe`; a failed build leaves nothing behind.

        Raises:
            Skip: `build` did.
        """
        if self.holds(recipe):
            return
        say(f"{announce} in {self.directory}")
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        try:
            build()
        except BaseException:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise
        (self.directory / "ready").write_text(recipe, encoding="utf-8")

    def make_venv(self) -> None:
        """Make the directory a virtual environment of our own interpreter. Raises Skip."""
        run_step([sys.executable, "-m", "venv", str(self.directory)])

    def pip(self, *arguments: str) -> None:
        """Run `pip install` in the virtual environment. Raises Skip."""
        quiet = ("--quiet", "--disable-pip-version-check")
        run_step([str(self.python), "-m", "pip", "install", *quiet, *arguments])
