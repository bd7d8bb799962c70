"""tests/threats.yaml is true: what it names exists, and no test of the files about strangers is left out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml

from .test_requirements import TESTS, missing_tests, names_in
from .tree import ROOT

LIST: dict[str, Any] = yaml.safe_load((TESTS / "threats.yaml").read_text(encoding="utf-8"))
THREATS: list[dict[str, Any]] = LIST["threats"]


def missing_defences(threats: list[dict[str, Any]]) -> list[str]:
    """Return every file that is named as a defence and does not exist."""
    return [f"{t['id']}: {file}" for t in threats for file in t["defence"] if not (ROOT / file).is_file()]


def test_every_threat_has_a_sentence_a_defence_and_tests() -> None:
    for threat in THREATS:
        assert set(threat) - {"left"} == {"id", "threat", "defence", "tests"}, threat
        assert threat["threat"].endswith("."), threat["id"]
        assert threat.get("left", ".").endswith("."), threat["id"]
        assert threat["defence"], threat["id"]
        assert threat["tests"], threat["id"]
    assert [name for name, count in Counter(threat["id"] for threat in THREATS).items() if count > 1] == []


def test_every_defence_and_every_test_that_is_named_exists() -> None:
    assert missing_defences(THREATS) == []
    assert missing_tests(THREATS, TESTS) == []


def test_no_test_about_strangers_is_left_out() -> None:
    named = {node_id for threat in THREATS for node_id in threat["tests"]}
    for file in LIST["whole"]:
        assert {f"{file}::{name}" for name in names_in(TESTS / file)} - named == set()


def test_a_defence_that_is_gone_is_found() -> None:
    assert missing_defences([{"id": "a.b", "defence": ["gateway/auth.py", "gateway/gone.py"]}]) == [
        "a.b: gateway/gone.py"
    ]
