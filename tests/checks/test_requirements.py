"""The promises in tests/requirements.yaml and the tests hold each other: neither names what the other lacks."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from .tree import ROOT

TESTS = ROOT / "tests"
MANIFEST: dict[str, Any] = yaml.safe_load((TESTS / "requirements.yaml").read_text(encoding="utf-8"))
PROMISES: list[dict[str, Any]] = MANIFEST["promises"]
FOLDERS = ("gateway", "journeys")
_ID = re.compile(r"[a-z0-9_]+\.[a-z0-9_]+")


def names_in(path: Path) -> set[str]:
    """Return the names of a file's tests; those of a class as `Class::test`."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        before = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {
            f"{before}{each.name}"
            for each in inner
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) and each.name.startswith("test_")
        }
    return found


def missing_tests(promises: list[dict[str, Any]], root: Path) -> list[str]:
    """Return every test that is named and does not exist."""
    missing = []
    for promise in promises:
        for node_id in promise["tests"]:
            file, _, name = node_id.partition("::")
            path = root / file
            if not path.is_file() or name not in names_in(path):
                missing.append(f"{promise['id']}: {node_id}")
    return missing


def files_without_promise(manifest: dict[str, Any], files: set[str]) -> set[str]:
    """Return the test files that no promise names and that are not set apart."""
    named = {node_id.partition("::")[0] for promise in manifest["promises"] for node_id in promise["tests"]}
    return files - named - set(manifest["internal"])


def test_every_promise_has_an_id_a_sentence_a_rule_and_tests() -> None:
    for promise in PROMISES:
        assert set(promise) == {"id", "says", "rule", "tests"}, promise
        assert _ID.fullmatch(promise["id"]), promise["id"]
        assert promise["says"].endswith("."), promise["id"]
        assert promise["tests"], promise["id"]
    assert [name for name, count in Counter(promise["id"] for promise in PROMISES).items() if count > 1] == []


def test_every_test_that_is_named_exists() -> None:
    assert missing_tests(PROMISES, TESTS) == []


def test_every_file_of_tests_that_clients_would_care_for_holds_a_promise() -> None:
    files = {path.relative_to(TESTS).as_posix() for folder in FOLDERS for path in (TESTS / folder).glob("test_*.py")}
    assert files_without_promise(MANIFEST, files) == set()
    assert set(MANIFEST["internal"]) <= files
    assert all(MANIFEST["internal"].values())


@pytest.mark.parametrize("tests", [["gateway/test_a.py::test_gone"], ["gateway/test_gone.py::test_one"]])
def test_a_test_that_is_gone_is_found(tmp_path: Path, tests: list[str]) -> None:
    (tmp_path / "gateway").mkdir()
    (tmp_path / "gateway/test_a.py").write_text(
        "async def test_one(): ...\nclass TestB:\n    def test_two(self): ...\n"
    )
    good = {"id": "a.b", "tests": ["gateway/test_a.py::test_one", "gateway/test_a.py::TestB::test_two"]}
    assert missing_tests([good], tmp_path) == []
    assert missing_tests([{"id": "a.b", "tests": tests}], tmp_path) == [f"a.b: {tests[0]}"]


def test_a_file_that_nobody_names_is_found() -> None:
    manifest = {
        "promises": [{"id": "a.b", "tests": ["gateway/test_a.py::test_one"]}],
        "internal": {"gateway/test_b.py": "x"},
    }
    files = {"gateway/test_a.py", "gateway/test_b.py", "gateway/test_c.py"}
    assert files_without_promise(manifest, files) == {"gateway/test_c.py"}
