"""What a source text means, and whether it is already on this disk.

A source is a catalog name, a Hub id (`org/name`, or `org/name/folder` for a folder of a repository that holds many
models, with `@revision` if wanted), a local directory, a .gguf file or a Piper voice's .onnx file.

Above it: `pull` and the orchestrator (through `find`). Below it: `catalog`, `layout`, `footprint`. No network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hostler.errors import InvalidRequest, ModelNotFound

from orchestrator.store.catalog import CATALOG, CatalogEntry, entry_of
from orchestrator.store.footprint import check_files
from orchestrator.store.layout import (
    Origin,
    StoredModel,
    key_of,
    read_all,
    read_manifest,
    resolve_models_dir,
    stored,
)
from orchestrator.store.piper import SUFFIX, voice_file
from orchestrator.store.whisper import is_ctranslate2, weights_in

_HUB_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_HUB_ID = re.compile(rf"({_HUB_PART}/{_HUB_PART})(?:/({_HUB_PART}(?:/{_HUB_PART}){{0,7}}))?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,127}")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository on the Hub, or a folder of one. `revision` is None when the caller did not ask for one."""

    hub_id: str
    revision: str | None
    folder: str = ""

    @property
    def name(self) -> str:
        """As people write it, without a revision."""
        return f"{self.hub_id}/{self.folder}" if self.folder else self.hub_id

    @property
    def key(self) -> str:
        """Directory name in the store."""
        return key_of(self.name, self.revision)


@dataclass(frozen=True, slots=True)
class CatalogSource:
    """An entry of the built-in catalog."""

    entry: CatalogEntry

    @property
    def key(self) -> str:
        """Directory name in the store."""
        return key_of(self.entry.name)


@dataclass(frozen=True, slots=True)
class DirectorySource:
    """A local directory, used in place."""

    path: Path


@dataclass(frozen=True, slots=True)
class GgufSource:
    """A local GGUF file, to be converted once."""

    path: Path


@dataclass(frozen=True, slots=True)
class VoiceSource:
    """A local Piper voice, one of perhaps many in its directory, to be copied once."""

    path: Path


Source = HubSource | CatalogSource | DirectorySource | GgufSource | VoiceSource


def _looks_like_a_path(text: str) -> bool:
    return text.startswith(("/", "./", "../", "~")) or text in (".", "..") or text.lower().endswith((".gguf", SUFFIX))


def parse(text: str, revision: str | None = None) -> Source:
    """Return what `text` means. Paths are told by how they begin or end, or by being a model directory.

    Raises:
        ModelNotFound: no such file or directory, or no such form of name.
        InvalidRequest: a revision where there can be none, or a malformed one.
    """
    if _looks_like_a_path(text) or (Path(text) / "config.json").is_file() or voice_file(Path(text)) is not None:
        path = Path(text).expanduser().absolute()
        if revision is not None:
            raise InvalidRequest("A local model has no revision; leave it out.", param="revision")
        if not path.exists():
            raise ModelNotFound(f"There is no file or directory {text!r}.", param="model")
        if path.is_dir():
            return DirectorySource(path)
        return VoiceSource(path) if path.name.endswith(SUFFIX) else GgufSource(path)
    name, at, tail = text.partition("@")
    if at and revision is not None and revision != tail:
        raise InvalidRequest(f"Two revisions are asked for: {tail!r} and {revision!r}.", param="revision")
    revision = tail if at else revision
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise InvalidRequest(f"{revision[:80]!r} is not a branch, tag or commit.", param="revision")
    if entry := entry_of(name):
        return CatalogSource(entry) if revision is None else HubSource(entry.hub_id, revision, entry.folder)
    if (parts := _HUB_ID.fullmatch(name)) and "--" not in name and ".." not in name:
        return HubSource(parts[1], revision, parts[2] or "")
    known = ", ".join(entry.name for entry in CATALOG)
    raise ModelNotFound(
        f"No model is called {text[:120]!r}. Use a Hub id (org/name, org/name/folder), a directory, a .gguf or .onnx "
        f"file, or one of: {known}.",
        param="model",
    )


def open_directory(path: Path) -> StoredModel:
    """Return a directory as a model, used in place.

    Raises:
        InvalidRequest: it holds no config.json or no tokenizer.
        ModelLoadFailed: its weights are missing or damaged.
    """
    is_voice = voice_file(path) is not None
    if not is_voice and not (path / "config.json").is_file():
        raise InvalidRequest(
            f"Directory {path.name!r} is not a model: it has no config.json, nor one Piper voice (.onnx, .onnx.json).",
            param="model",
        )
    if not is_voice and not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise InvalidRequest(f"Directory {path.name!r} has no tokenizer (tokenizer.json or the like).", param="model")
    return StoredModel(path.name, path, "directory", "", check_files(path), path.stat().st_mtime)


def find(source: str, models_dir: Path | None = None, revision: str | None = None) -> StoredModel | None:
    """Return the model that `source` means if it is on this disk; None if a pull is needed first.

    Fast: reads manifests and headers, never weights, never the network.

    Raises:
        ModelNotFound, InvalidRequest: `source` can mean nothing.
        ModelLoadFailed: it is a local directory whose files are damaged.
    """
    root = resolve_models_dir(models_dir)
    if revision is None and not _looks_like_a_path(source):
        directory = root / key_of(source)
        if manifest := read_manifest(directory):
            return stored(directory, manifest)
    parsed = parse(source, revision)
    if isinstance(parsed, DirectorySource) and not is_ctranslate2(parsed.path):
        return open_directory(parsed.path)
    if isinstance(parsed, GgufSource | VoiceSource | DirectorySource):
        origin = Origin.of(weights_in(parsed.path) if isinstance(parsed, DirectorySource) else parsed.path)
        for directory, manifest in read_all(root):
            if manifest.origin == origin:
                return stored(directory, manifest)
        return None
    directory = root / parsed.key
    found = read_manifest(directory)
    return stored(directory, found) if found else None
