"""Rules of the whole tree that no tool checks: sizes, names, design notes, words that have no place here."""

from __future__ import annotations

import ast
import re
import tomllib

import pytest

from .tree import ROOMS, ROOT, is_generated, repository_files

MAX_LINES = 400
# Written in parts so that this file does not hold them.
FORBIDDEN = [
    "../sha" + "red",
    "/wo" + "rk/",
    "/opt/" + "wheels",
    "pypi" + ".org",
    "files.python" + "hosted",
    "CEO'" + "s",
]
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "manager", "common", "misc"}
SOURCES = [p for p in repository_files() if p.suffix == ".py" and not is_generated(p)]


def relative(paths: list) -> list[str]:  # type: ignore[type-arg]
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def test_no_file_is_longer_than_the_limit() -> None:
    texts = [p for p in repository_files() if p.suffix in (".py", ".sh", ".proto", ".md") and not is_generated(p)]
    assert relative([p for p in texts if len(p.read_text(encoding="utf-8").splitlines()) > MAX_LINES]) == []


def test_no_file_has_a_vague_name() -> None:
    assert relative([p for p in SOURCES if p.stem in VAGUE_NAMES]) == []


def test_nothing_mentions_the_place_it_was_made_in() -> None:
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {word}" for word in FORBIDDEN if word in text]
    assert found == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_its_design_note(room: str) -> None:
    note = ROOT / room / "README.md"
    assert note.is_file()
    assert len(note.read_text(encoding="utf-8").splitlines()) > 5


def test_every_module_says_what_it_is() -> None:
    silent = [p for p in SOURCES if p.read_text().strip() and not ast.get_docstring(ast.parse(p.read_text()))]
    assert relative(silent) == []


def test_only_the_tests_sleep_or_assert_their_way_through_input() -> None:
    """`assert` is for our own bugs; a message that blames the caller belongs to an exception."""
    blamed = re.compile(r"^\s*assert .*(request|user|input)\b.*,\s*f?\"", re.MULTILINE)
    rooms = [p for p in SOURCES if p.relative_to(ROOT).parts[0] != "tests"]
    assert relative([p for p in rooms if blamed.search(p.read_text())]) == []


def test_the_gateway_extra_carries_no_model_library() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = " ".join(project["dependencies"] + project["optional-dependencies"]["gateway"])
    assert not re.search(r"\b(torch|transformers|ray)\b", needs)
