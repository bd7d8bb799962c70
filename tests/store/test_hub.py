"""Pulling from the Hub, against a loopback stand-in that answers what huggingface_hub asks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hostler.errors import InvalidRequest, ModelLoadFailed, ModelNotFound, PermissionDenied, Unavailable

import orchestrator.store.download as download
import orchestrator.store.remote_code as remote_code
from orchestrator.models import ModelSpec, demand
from orchestrator.store import find
from orchestrator.store.layout import list_stored, read_manifest
from orchestrator.store.progress import Progress
from orchestrator.store.pull import Options, pull
from orchestrator.store_client import StoreClient
from tests.store.hub_stand_in import COMMIT, HubStandIn, Repository

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(download.fetch.__kwdefaults__, "pause", lambda _s: None)


def test_a_pull_pins_the_commit_and_stores_every_file_with_its_hash(
    hub: HubStandIn, models_dir: Path, tiny_model: Path, told: list[Progress]
) -> None:
    hub.repositories["org/tiny"] = Repository.of(tiny_model)
    model = pull("org/tiny", options=Options(models_dir, report=told.append))
    manifest = read_manifest(model.path)
    assert manifest is not None
    assert (model.name, model.source, model.revision) == ("org/tiny", "org/tiny", COMMIT)
    assert model.path == models_dir / "org--tiny"
    for file in manifest.files:
        data = (tiny_model / file.path).read_bytes()
        assert (file.sha256, file.num_bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    assert {file.path for file in manifest.files} == {path.name for path in tiny_model.iterdir()}
    assert find("org/tiny", models_dir) == model


def test_progress_of_a_download_only_grows_and_ends_at_the_total(
    hub: HubStandIn, models_dir: Path, tiny_model: Path, told: list[Progress]
) -> None:
    hub.repositories["org/tiny"] = Repository.of(tiny_model)
    pull("org/tiny", options=Options(models_dir, report=told.append))
    done = [p.done_bytes for p in told if p.stage == "download" and p.total_bytes]
    assert done == sorted(done)
    assert done[-1] == sum(path.stat().st_size for path in tiny_model.iterdir())


def test_a_connection_that_is_cut_is_continued_where_it_was_cut(
    hub: HubStandIn, models_dir: Path, tiny_model: Path
) -> None:
    hub.repositories["org/tiny"] = Repository.of(tiny_model)
    hub.faults.cut_after[WEIGHTS] = 100_000
    pull("org/tiny", options=Options(models_dir))
    assert [start for path, start in hub.served if path == WEIGHTS] == [0, 100_000]


def test_a_pull_that_was_stopped_is_resumed_by_the_next_one(
    hub: HubStandIn, models_dir: Path, tiny_model: Path
) -> None:
    hub.repositories["org/tiny"] = Repository.of(tiny_model)
    hub.faults.cut_after[WEIGHTS] = 70_000

    class Stopped(BaseException):
        pass

    def stop_at_the_cut(progress: Progress) -> None:
        if progress.detail == WEIGHTS and len([1 for path, _ in hub.served if path == WEIGHTS]) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        pull("org/tiny", options=Options(models_dir, report=stop_at_the_cut))
    assert list_stored(models_dir) == []
    kept = (models_dir / "org--tiny.partial" / f".{WEIGHTS}.incomplete").stat().st_size
    assert kept >= 70_000
    hub.served.clear()
    model = pull("org/tiny", options=Options(models_dir))
    assert hub.served == [(WEIGHTS, kept)]
    assert (model.path / WEIGHTS).read_bytes() == (tiny_model / WEIGHTS).read_bytes()
    assert not list(model.path.glob(".*"))


def test_a_server_that_ignores_ranges_still_gives_the_right_bytes(
    hub: HubStandIn, models_dir: Path, tiny_model: Path
) -> None:
    hub.repositories["org/tiny"] = Repository.of(tiny_model)
    hub.faults.cut_after[WEIGHTS] = 50_000
    hub.faults.ignore_ranges = True
    model = pull("org/tiny", options=Options(models_dir))
    assert (model.path / WEIGHTS).read_bytes() == (tiny_model / WEIGHTS).read_bytes()


@pytest.mark.parametrize("path", [WEIGHTS, "config.json"])
def test_a_file_that_arrives_damaged_is_named_and_not_kept(
    hub: HubStandIn, models_dir: Path, tiny_model: Path, path: str
) -> None:
    hub.repositories["org/tiny"] = Repository.of(tiny_model)
    hub.faults.corrupt.add(path)
    with pytest.raises(ModelLoadFailed, match=f"{path} arrived damaged"):
        pull("org/tiny", options=Options(models_dir))
    assert list_stored(models_dir) == []
    partial = models_dir / "org--tiny.partial"
    assert not (partial / path).exists()
    assert not (partial / f".{path}.incomplete").exists()
    hub.faults.corrupt.clear()
    assert pull("org/tiny", options=Options(models_dir)).name == "org/tiny"


def test_a_busy_hub_is_asked_again_and_a_broken_one_given_up_with_what_arrived_kept(
    hub: HubStandIn, models_dir: Path, tiny_model: Path
) -> None:
    hub.repositories["org/tiny"] = Repository.of(tiny_model)
    hub.faults.statuses[WEIGHTS] = [503, 429]
    pull("org/tiny", options=Options(models_dir))
    hub.repositories["org/other"] = Repository.of(tiny_model)
    hub.faults.statuses[WEIGHTS] = [500] * 5
    with pytest.raises(Unavailable, match="Pull again to go on"):
        pull("org/other", options=Options(models_dir))
    assert (models_dir / "org--other.partial" / "config.json").exists()


def test_a_repository_without_safetensors_is_refused_before_any_file(
    hub: HubStandIn, models_dir: Path, tiny_model: Path
) -> None:
    repository = Repository.of(tiny_model)
    repository.files["pytorch_model.bin"] = repository.files.pop(WEIGHTS)
    hub.repositories["org/old"] = repository
    with pytest.raises(InvalidRequest, match="no safetensors"):
        pull("org/old", options=Options(models_dir))
    assert hub.served == []


def test_only_safetensors_and_text_files_of_the_top_folder_are_taken(
    hub: HubStandIn, models_dir: Path, tiny_model: Path
) -> None:
    repository = Repository.of(tiny_model)
    repository.files |= {"pytorch_model.bin": b"x", "train.py": b"x", "onnx/model.safetensors": b"x", "a.png": b"x"}
    repository.files |= {"consolidated.safetensors": b"x", "model.fp16.safetensors": b"x"}
    hub.repositories["org/tiny"] = repository
    model = pull("org/tiny", options=Options(models_dir))
    assert {path.name for path in model.path.iterdir()} == {p.name for p in tiny_model.iterdir()} | {"manifest.json"}


def with_code(directory: Path, **changes: object) -> Repository:
    """Return a repository whose config and tokenizer name Python code, which ends whoever runs it."""
    repository = Repository.of(directory)
    model = {"auto_map": {"AutoConfig": "m.Config", "AutoModelForCausalLM": "m.Model"}, **changes}
    tokenizer = {"auto_map": {"AutoTokenizer": ["m.Tokenizer", None]}}
    for name, values in (("config.json", model), ("tokenizer_config.json", tokenizer)):
        repository.files[name] = json.dumps(json.loads(repository.files[name]) | values).encode()
    repository.files["m.py"] = b"raise SystemExit(77)"
    return repository


def test_a_model_that_needs_its_own_python_code_is_refused_before_its_weights_unless_trusted(
    hub: HubStandIn, models_dir: Path, tiny_model: Path
) -> None:
    hub.repositories["org/code"] = with_code(tiny_model, model_type="homemade")
    with pytest.raises(InvalidRequest, match=r"'homemade'.*trust_remote_code: true"):
        pull("org/code", options=Options(models_dir))
    assert not {WEIGHTS, "m.py"} & {path for path, _ in hub.served}
    model = pull("org/code", options=Options(models_dir, trust_remote_code=True))
    assert (model.path / "m.py").exists()


def test_a_model_that_transformers_knows_is_taken_without_its_python_code_and_loads(
    hub: HubStandIn, models_dir: Path, tiny_model: Path
) -> None:
    hub.repositories["org/code"] = with_code(tiny_model)
    model = pull("org/code", options=Options(models_dir))
    assert "m.py" not in {path for path, _ in hub.served}
    assert not list(model.path.rglob("*.py"))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=False, local_files_only=True)
    plain = AutoTokenizer.from_pretrained(tiny_model, local_files_only=True)
    assert tokenizer("for line in file:")["input_ids"] == plain("for line in file:")["input_ids"]
    loaded, original = (
        AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, local_files_only=True, dtype=torch.float32)
        for path in (model.path, tiny_model)
    )
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), original.parameters(), strict=True))


def test_a_tokenizer_that_is_only_python_code_is_refused(hub: HubStandIn, models_dir: Path, tiny_model: Path) -> None:
    repository = with_code(tiny_model)
    del repository.files["tokenizer.json"]
    repository.files["vocab.json"] = b"{}"
    hub.repositories["org/code"] = repository
    with pytest.raises(InvalidRequest, match=r"no tokenizer\.json.*trust_remote_code: true"):
        pull("org/code", options=Options(models_dir))
    assert WEIGHTS not in {path for path, _ in hub.served}


@pytest.mark.parametrize("model_type", ["", "--help", "qwen3; id", "../qwen3"])
def test_a_model_type_that_is_no_name_is_not_asked_for(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_code.subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    config = {"model_type": model_type, "auto_map": {"AutoConfig": "m.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidRequest, match="Python code of its own"):
        remote_code.refuse_needed_code("org/code", tmp_path)


def test_when_transformers_cannot_be_asked_the_pull_fails_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_code.sys, "executable", "/bin/false")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "auto_map": {"AutoConfig": "m.Config"}}))
    with pytest.raises(ModelLoadFailed, match="could not be asked"):
        remote_code.refuse_needed_code("org/code", tmp_path)


async def test_the_orchestrator_s_pull_trusts_the_code_that_the_configuration_trusts(
    hub: HubStandIn, models_dir: Path, tiny_model: Path
) -> None:
    """A past bug: the key reached the worker but not the pull, so such a model could never be fetched."""
    hub.repositories["org/code"] = with_code(tiny_model, model_type="homemade")
    client = StoreClient(models_dir)
    with pytest.raises(InvalidRequest, match="trust_remote_code"):
        await client.fetch(ModelSpec("code", "org/code"), lambda _: None)
    await client.fetch(ModelSpec("code", "org/code", trust_remote_code=True), lambda _: None)
    located = await client.locate(ModelSpec("code", "org/code"))
    assert located is not None
    assert (Path(located.path) / "m.py").exists()


async def test_a_quantized_model_is_located_with_the_bytes_it_will_take(models_dir: Path, tiny_model: Path) -> None:
    client = StoreClient(models_dir)
    found = []
    for quantize in ("", "int8", "int4"):
        spec = ModelSpec("tiny", str(tiny_model), dtype="bfloat16", quantize=quantize)
        located = await client.locate(spec)
        assert located is not None
        found.append(located)
    sizes = [located.footprint.weight_bytes for located in found]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    # Where it is not quantized, advice can say what that would save.
    assert found[0].quantized == (("int8", sizes[1]), ("int4", sizes[2]))
    assert found[1].quantized == ()
    saved = demand(ModelSpec("tiny", str(tiny_model)), found[0])
    assert [saved.base_bytes - num_bytes for _, num_bytes in saved.quantized_bytes] == [
        sizes[0] - sizes[1],
        sizes[0] - sizes[2],
    ]


def test_unknown_models_revisions_and_gated_ones_each_get_their_own_sentence(
    hub: HubStandIn, models_dir: Path, tiny_model: Path
) -> None:
    hub.repositories["org/tiny"] = Repository.of(tiny_model)
    hub.repositories["org/gated"] = Repository({}, gated=True)
    with pytest.raises(ModelNotFound, match="no model 'org/none'"):
        pull("org/none", options=Options(models_dir))
    with pytest.raises(ModelNotFound, match="no revision 'v9'"):
        pull("org/tiny", "v9", Options(models_dir))
    with pytest.raises(PermissionDenied, match="accept its terms"):
        pull("org/gated", options=Options(models_dir))


def test_a_revision_is_a_model_of_its_own(hub: HubStandIn, models_dir: Path, tiny_model: Path) -> None:
    hub.repositories["org/tiny"] = Repository.of(tiny_model)
    pull("org/tiny", options=Options(models_dir))
    pinned = pull(f"org/tiny@{COMMIT}", options=Options(models_dir))
    assert pinned.path != models_dir / "org--tiny"
    assert find("org/tiny", models_dir, COMMIT) == pinned


def test_a_hub_that_cannot_be_reached_is_said_so(models_dir: Path) -> None:
    with pytest.raises(Unavailable, match="cannot be reached"):
        pull("org/tiny", options=Options(models_dir))


def test_a_catalog_name_comes_from_the_hub_when_it_answers(hub: HubStandIn, models_dir: Path, tiny_model: Path) -> None:
    hub.repositories["HuggingFaceTB/SmolLM2-135M-Instruct"] = Repository.of(tiny_model)
    model = pull("smollm2", options=Options(models_dir))
    assert (model.name, model.revision) == ("SmolLM2-135M-Instruct", COMMIT)
    assert find("HuggingFaceTB/SmolLM2-135M-Instruct", models_dir) == model
