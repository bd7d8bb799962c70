"""What the checks look at: the repository's files as git knows them, and commands found in its Markdown."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("proto", "gateway", "workers", "orchestrator", "cli", "deploy", "tests")
_GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$")
_FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def repository_files() -> list[Path]:
    """Return every file that is or could be committed (tracked, or untracked and not ignored)."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [path for line in listing.stdout.splitlines() if (path := ROOT / line).is_file()]


def is_generated(path: Path) -> bool:
    """Tell whether protoc wrote it."""
    return _GENERATED.search(path.name) is not None


def copy_packages(target: Path) -> None:
    """Copy the five packages and pyproject.toml to `target`, as a tree that can be broken on purpose."""
    for path in repository_files():
        relative = path.relative_to(ROOT)
        if relative.parts[0] in ("proto", "gateway", "workers", "orchestrator", "cli", "pyproject.toml"):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / relative)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block of a Markdown file."""

    file: str
    language: str
    text: str

    def commands(self) -> list[str]:
        """Return its shell commands: backslash line ends joined, comments and prompts dropped."""
        joined = re.sub(r"\\\n\s*", " ", self.text)
        lines = (line.strip().removeprefix("$ ") for line in joined.splitlines())
        return [line for line in lines if line and not line.startswith("#")]


def blocks(path: Path) -> list[Block]:
    """Return the fenced blocks of a Markdown file that name a language."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT).as_posix()
    return [Block(name, match[1], match[2]) for match in _FENCE.finditer(text)]


def documents() -> list[Path]:
    """Return the README of the repository and of every room, and CONTRIBUTING."""
    return [path for path in repository_files() if path.name in ("README.md", "CONTRIBUTING.md")]
