"""What the documents say can be typed: every command exists, every file is there, and the examples really run."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.journeys.server import Server

from .tree import ROOT, Block, blocks, documents

README = blocks(ROOT / "README.md")
HOSTLER = Path(sys.executable).with_name("hostler")
MODEL_ANSWER = "Paris"
_LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def shell_commands(program: str) -> list[tuple[str, str]]:
    """Return (file, command line) of every line of every document that starts with `program`."""
    found = []
    for path in documents():
        for block in blocks(path):
            if block.language in ("sh", "bash", "console"):
                found += [(block.file, line) for line in block.commands() if line.split()[0] == program]
    return found


@functools.cache
def help_of(*command: str) -> tuple[int, str]:
    result = subprocess.run(
        [HOSTLER, *command, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"COLUMNS": "200", "PATH": "/usr/bin:/bin", "NO_COLOR": "1", "TERM": "dumb", "HOME": str(Path.home())},
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize(("file", "line"), shell_commands("hostler"))
def test_a_hostler_command_in_the_documents_exists_with_its_options(file: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    if words[:2] == ["service", "install"] and "--" in words:
        words, passed_on = words[: words.index("--")], words[words.index("--") + 1 :]
        assert_exists(file, line, ("serve",), passed_on)
    # `hostler GROUP COMMAND`, `hostler COMMAND ARGUMENT`, or `hostler --option`
    of_group = len(words) > 1 and "COMMAND [ARGS]" in help_of(*words[:1])[1] and not words[1].startswith("-")
    command = tuple(word for word in words[: 2 if of_group else 1] if not word.startswith("-"))
    assert_exists(file, line, command, words)


def assert_exists(file: str, line: str, command: tuple[str, ...], words: list[str]) -> None:
    status, text = help_of(*command)
    assert status == 0, f"{file}: {line}\n{text}"
    options = [word.split("=")[0] for word in words if word.startswith("-")]
    unknown = [option for option in options if option != "--help" and not re.search(rf"{option}\b", text)]
    assert unknown == [], f"{file}: {line}"


@pytest.mark.parametrize(("file", "line"), shell_commands("make"))
def test_a_make_target_in_the_documents_exists(file: str, line: str) -> None:
    targets = [word for word in shlex.split(line)[1:] if "=" not in word]
    listed = subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True, check=False)
    assert listed.returncode == 0, f"{file}: {line}\n{listed.stderr}"


def test_the_readme_begins_with_serve_and_test() -> None:
    commands = [line for block in README if block.language == "sh" for line in block.commands()]
    assert commands[:2] == ["make serve", "make test"]


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file(path: Path) -> None:
    targets = _LINK.findall(path.read_text(encoding="utf-8"))
    assert [target for target in targets if not (path.parent / target).exists()] == []


def example(language: str, word: str) -> Block:
    return next(block for block in README if block.language == language and word in block.text)


def run_against(server: Server, command: list[str], text: str) -> subprocess.CompletedProcess[str]:
    assert "localhost:8000" in text
    return subprocess.run(
        [*command, text.replace("localhost:8000", f"localhost:{server.port}")],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


@pytest.mark.journey
@pytest.mark.real_model
@pytest.mark.timeout(300)
def test_the_curl_example_is_answered(real_server: Server) -> None:
    result = run_against(real_server, ["bash", "-c"], example("sh", "curl").text)
    assert MODEL_ANSWER in result.stdout, result.stdout + result.stderr


@pytest.mark.journey
@pytest.mark.real_model
@pytest.mark.timeout(300)
def test_the_python_example_prints_the_answer(real_server: Server) -> None:
    result = run_against(real_server, [sys.executable, "-c"], example("python", "OpenAI").text)
    assert MODEL_ANSWER in result.stdout, result.stdout + result.stderr


@pytest.mark.journey
@pytest.mark.real_model
@pytest.mark.timeout(300)
def test_the_line_that_serve_prints_is_answered(real_server: Server) -> None:
    printed = real_server.output.read_text(encoding="utf-8")
    line = next(line for line in printed.splitlines() if line.lstrip().startswith("curl "))
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=90, check=False)
    assert MODEL_ANSWER in result.stdout, result.stdout + result.stderr
