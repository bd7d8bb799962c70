"""The contracts: generated code is what the .proto files say, and a drifted file would be seen."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from .tree import ROOT, is_generated, repository_files


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("generated")
    subprocess.run([ROOT / "deploy/proto.sh", target], check=True, capture_output=True, timeout=60)
    return target


def test_generated_code_is_identical_to_what_protoc_writes_now(regenerated: Path) -> None:
    committed = {p.relative_to(ROOT / "proto"): p.read_text() for p in repository_files() if is_generated(p)}
    written = {p.relative_to(regenerated): p.read_text() for p in regenerated.rglob("*") if p.is_file()}
    assert committed.keys() == written.keys()
    assert [str(name) for name in written if written[name] != committed[name]] == []


@pytest.mark.parametrize("contract", ["inference", "lifecycle", "placement"])
def test_a_contract_has_its_package_and_a_service(contract: str) -> None:
    text = (ROOT / f"proto/hostler/{contract}/v1/{contract}.proto").read_text()
    assert f"package hostler.{contract}.v1;" in text
    assert f"service {contract.capitalize()}Service" in text
