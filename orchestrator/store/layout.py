"""The store on disk: which directories are models, and what their manifests say.

    <models_dir>/
        SmolLM2-135M-Instruct/          a model: exists because its manifest.json does
            manifest.json  config.json  model.safetensors  tokenizer.json ...
        org--name@v1.partial/           a pull in progress, or cut short; the next pull goes on from it
        .locks/<key>.lock               flock held by the pull or removal of that model

Above it: everything else in the store. Below it: files. Nothing here uses the network.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hostler.errors import InvalidRequest

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PARTIAL_SUFFIX = ".partial"
LOCKS = ".locks"
_MAX_KEY_BYTES = 200


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model that is on this disk, whole.

    Attributes:
        name: what to show and ask for.
        path: its directory.
        source: where it came from (Hub id, wheel, GGUF file name, or directory).
        revision: Hub commit, or SHA-256 of the wheel or GGUF file; "" for a directory used in place.
        weight_bytes: size of its safetensors or ONNX files.
        created_unix_s: when it was stored.
    """

    name: str
    path: Path
    source: str
    revision: str
    weight_bytes: int
    created_unix_s: float


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a model, as it was when the model was stored."""

    path: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Origin:
    """The local file that a model was made from; lets `find` recognise it without reading it again."""

    path: str
    num_bytes: int
    mtime_ns: int

    @staticmethod
    def of(path: Path) -> Origin:
        """Return the identity of the file at `path` as it is now."""
        info = path.stat()
        return Origin(str(path.resolve()), info.st_size, info.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What manifest.json says. `converter` is the version of our GGUF conversion, "" if nothing was converted."""

    name: str
    source: str
    revision: str
    files: tuple[StoredFile, ...]
    created_unix_s: float
    converter: str = ""
    origin: Origin | None = None
    version: int = field(default=1)

    def to_json(self) -> str:
        """Return the text of manifest.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Parse manifest.json.

        Raises:
            ValueError: it is not a manifest of a version we know.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            if values["version"] != 1:
                raise ValueError(f"manifest version {values['version']} is not known")
            files = tuple(StoredFile(**file) for file in values.pop("files"))
            origin = values.pop("origin")
            return Manifest(files=files, origin=Origin(**origin) if origin else None, **values)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a manifest: {error}") from error


def cache_dir() -> Path:
    """Return hostler's cache directory of this user."""
    return Path.home() / ".cache" / "hostler"


def resolve_models_dir(models_dir: Path | None) -> Path:
    """Return `models_dir`, else $HOSTLER_MODELS_DIR, else ~/.cache/hostler/models; absolute."""
    if models_dir is None and (text := os.environ.get("HOSTLER_MODELS_DIR")):
        models_dir = Path(text)
    return (models_dir or cache_dir() / "models").expanduser().absolute()


def key_of(name: str, revision: str | None = None) -> str:
    """Return the directory name of a model: `org/name` becomes `org--name`, a revision follows an `@`.

    Raises:
        InvalidRequest: the name cannot be a directory name.
    """
    text = name if revision is None else f"{name}@{revision}"
    key = "--".join(quote(part, safe="@") for part in text.split("/"))
    if not key or key.startswith(".") or key.endswith(PARTIAL_SUFFIX) or len(key) > _MAX_KEY_BYTES:
        raise InvalidRequest(f"{text[:80]!r} cannot be a model name.", param="model")
    return key


def read_manifest(directory: Path) -> Manifest | None:
    """Return the manifest of `directory`; None if it is no model."""
    try:
        return Manifest.from_json((directory / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        logger.warning("unreadable manifest", extra={"model": directory.name, "error": str(error)})
        return None


def stored(directory: Path, manifest: Manifest) -> StoredModel:
    """Return the model that `directory` holds."""
    weight_bytes = sum(file.num_bytes for file in manifest.files if file.path.endswith((".safetensors", ".onnx")))
    return StoredModel(
        manifest.name, directory, manifest.source, manifest.revision, weight_bytes, manifest.created_unix_s
    )


def read_all(models_dir: Path) -> list[tuple[Path, Manifest]]:
    """Return every model directory with its manifest, by name."""
    if not models_dir.is_dir():
        return []
    found = []
    for directory in sorted(models_dir.iterdir()):
        if directory.name.startswith(".") or directory.name.endswith(PARTIAL_SUFFIX):
            continue
        if manifest := read_manifest(directory):
            found.append((directory, manifest))
    return found


def list_stored(models_dir: Path | None = None) -> list[StoredModel]:
    """Return every model in the store, by name. Touches only manifests."""
    return [stored(directory, manifest) for directory, manifest in read_all(resolve_models_dir(models_dir))]
