"""The kernels' own benchmark: its steps, whose kernels it takes, and its arithmetic on times given by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from rich.console import Console

from tests.bench.kernels import Load, Version, shown, sources_of
from tests.bench.peers import Skip
from workers.text.native import build
from workers.text.native.decoder import STAGES


def test_steps_have_the_rows_that_their_names_say() -> None:
    assert (Load.decode(4).rows, Load.prefill(512).rows) == ((1, 1, 1, 1), (88, 88, 88, 88, 88, 72))
    assert Load.prefill(88).rows == (88,)
    assert all(sum(load.rows) == int(load.name.split()[-1]) for load in (Load.prefill(90), Load.prefill(512)))


def test_another_commits_kernels_are_its_own() -> None:
    try:
        with sources_of("HEAD") as place:
            assert (place / build.MAIN).is_file()
            assert build.library_path(place).parent == build.library_path().parent
            (place / build.MAIN).write_text("// another version")
            assert build.library_path(place) != build.library_path()
    except Skip as reason:
        pytest.skip(str(reason))


def test_no_such_commit_is_said() -> None:
    with pytest.raises(Skip, match="no kernels of nonsense"), sources_of("nonsense"):
        pass


def test_the_ratio_is_that_of_neighbours_not_of_medians() -> None:
    load = Load.decode(1)
    parts = [dict.fromkeys(STAGES, 0.001)] * 3
    # The machine slowed down under way: each pair says a half, while the medians say three quarters.
    first = Version("first", None, 0, {load.name: [1.0, 2.0, 8.0]}, {load.name: parts})  # type: ignore[arg-type]
    second = Version("second", None, 0, {load.name: [0.5, 1.5, 4.0]}, {load.name: parts})  # type: ignore[arg-type]
    console = Console(record=True, width=160)
    console.print(shown([first, second], [load], "title"))
    assert "0.500" in console.export_text()
