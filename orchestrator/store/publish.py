"""Makes a model appear all at once: a lock for each model, a partial directory, hashes, manifest, rename.

Above it: `pull` and `remove`. Below it: `layout`, `footprint`, files.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hostler.errors import HostlerError, InvalidRequest, ModelLoadFailed, ModelNotFound

from orchestrator.store.footprint import check_files
from orchestrator.store.layout import (
    LOCKS,
    MANIFEST,
    PARTIAL_SUFFIX,
    Manifest,
    Origin,
    StoredFile,
    StoredModel,
    key_of,
    read_all,
    read_manifest,
    resolve_models_dir,
    stored,
)
from orchestrator.store.progress import Progress, Report, Stage, silent

_BLOCK_BYTES = 4 * 2**20
_SPARE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a model's files came from; goes into its manifest."""

    name: str
    source: str
    revision: str
    converter: str = ""
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class Workplace:
    """One model's place in the store while its lock is held.

    Attributes:
        directory: where the model will be.
        partial: where its files are gathered; survives a pull that was cut short.
        lock_fd: pass it to children that write into `partial`, so that the lock outlives us with them.
    """

    directory: Path
    partial: Path
    lock_fd: int


@contextmanager
def locked(root: Path, key: str, report: Report = silent) -> Iterator[Workplace]:
    """Hold the lock of the model `key`, waiting for whoever has it (and saying so once)."""
    try:
        (root / LOCKS).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root / LOCKS / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise explain(error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(Progress("download", 0, 0, "waiting for another pull of this model"))
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield Workplace(root / key, root / f"{key}{PARTIAL_SUFFIX}", descriptor)
    finally:
        # Closing (not LOCK_UN) leaves the lock with a child that still writes.
        os.close(descriptor)


def explain(error: OSError) -> HostlerError:
    """Return what an I/O error amounts to, in words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ModelLoadFailed("The disk that holds the models directory is full. Free some space and pull again.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ModelLoadFailed("The models directory cannot be written. Check its permissions or use --models-dir.")
    return ModelLoadFailed(f"The models directory cannot be used: {error.strerror or error}.")


def require_space(directory: Path, num_bytes: int) -> None:
    """Refuse early when `num_bytes` more will not fit on the disk of `directory` (which must exist).

    Raises:
        ModelLoadFailed: saying how much is needed and how much there is.
    """
    free_bytes = shutil.disk_usage(directory).free
    if num_bytes + _SPARE_BYTES > free_bytes:
        raise ModelLoadFailed(
            f"This model needs {num_bytes / 1e9:.2f} GB of disk and only {free_bytes / 1e9:.2f} GB are free. "
            "Free some space or use --models-dir."
        )


def sha256_of(path: Path, report: Report = silent, *, stage: Stage = "verify", done: int = 0, total: int = 0) -> str:
    """Return the SHA-256 of a file, reporting bytes as `done` so far of `total`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            done += len(block)
            report(Progress(stage, done, total, path.name))
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _model_files(partial: Path) -> list[Path]:
    # Names that begin with a dot are ours (downloads under way, work files), never the model's.
    return sorted(p for p in partial.rglob("*") if p.is_file() and p.name != MANIFEST and not _is_ours(p, partial))


def _is_ours(path: Path, partial: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(partial).parts)


def _refuse_links(partial: Path) -> None:
    """Refuse whatever is not a file or a directory, such as a link to another file of the machine."""
    for path in partial.rglob("*"):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ModelLoadFailed(f"{path.relative_to(partial)} is a link or a device; a model is made of plain files.")


def publish(place: Workplace, provenance: Provenance, report: Report) -> StoredModel:
    """Check, hash and sync the files in the partial directory, write the manifest, and rename it into place.

    Raises:
        ModelLoadFailed: damaged files (the partial directory is removed), or the disk failed (it stays).
    """
    try:
        _refuse_links(place.partial)
        check_files(place.partial)
    except ModelLoadFailed:
        shutil.rmtree(place.partial, ignore_errors=True)
        raise
    paths = _model_files(place.partial)
    total = sum(path.stat().st_size for path in paths)
    done, files = 0, []
    for path in paths:
        num_bytes = path.stat().st_size
        digest = sha256_of(path, report, done=done, total=total)
        _fsync(path)
        files.append(StoredFile(str(path.relative_to(place.partial)), digest, num_bytes))
        done += num_bytes
    for path in place.partial.iterdir():
        if path.name.startswith("."):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    manifest = Manifest(
        name=provenance.name,
        source=provenance.source,
        revision=provenance.revision,
        files=tuple(files),
        created_unix_s=round(time.time(), 3),
        converter=provenance.converter,
        origin=provenance.origin,
    )
    write_manifest(place.partial, manifest)
    if place.directory.exists():
        # Only a directory without a readable manifest can be here: `pull` looked while it held the lock.
        shutil.rmtree(place.directory)
    place.partial.rename(place.directory)
    _fsync(place.directory.parent)
    return stored(place.directory, manifest)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json so that it is there whole or not at all, also after a power cut."""
    temporary = directory / f".{MANIFEST}"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(directory / MANIFEST)
    _fsync(directory)


def _directory_of(name: str, root: Path) -> Path | None:
    exact = root / key_of(name)
    if read_manifest(exact):
        return exact
    for directory, manifest in read_all(root):
        if manifest.name.casefold() == name.casefold():
            return directory
    return None


def _existing(name: str, root: Path) -> Path:
    from orchestrator.store.catalog import entry_of

    directory = _directory_of(name, root)
    if directory is None and (entry := entry_of(name)):
        directory = _directory_of(entry.name, root)
    if directory is None:
        raise ModelNotFound(f"No stored model is called {name[:120]!r}. `hostler models` lists them.", param="model")
    return directory


def remove(name: str, models_dir: Path | None = None) -> StoredModel:
    """Take a model, and any partial download of it, off the disk. Workers that have it loaded keep it.

    Raises:
        ModelNotFound: no stored model has that name.
        InvalidRequest: the name cannot be one.
    """
    root = resolve_models_dir(models_dir)
    directory = _existing(name, root)
    with locked(root, directory.name) as place:
        manifest = read_manifest(directory)
        if manifest is None:
            raise ModelNotFound(f"Model {name[:120]!r} was just removed by somebody else.", param="model")
        # The manifest goes first: from here on the model does not exist, even if we are stopped half-way.
        (directory / MANIFEST).unlink()
        shutil.rmtree(directory)
        shutil.rmtree(place.partial, ignore_errors=True)
        return stored(directory, manifest)


def verify(name: str, models_dir: Path | None = None, report: Report = silent) -> StoredModel:
    """Hash every file of a stored model again and compare with its manifest.

    Raises:
        ModelNotFound: no stored model has that name.
        ModelLoadFailed: naming every file that is missing or differs.
    """
    directory = _existing(name, resolve_models_dir(models_dir))
    manifest = read_manifest(directory)
    if manifest is None:
        raise InvalidRequest("The manifest vanished while it was read.")
    total = sum(file.num_bytes for file in manifest.files)
    done, faults = 0, []
    for file in manifest.files:
        path = directory / file.path
        if not path.is_file():
            faults.append(f"{file.path} is missing")
        elif path.stat().st_size != file.num_bytes:
            faults.append(f"{file.path} has {path.stat().st_size} bytes instead of {file.num_bytes}")
        elif sha256_of(path, report, done=done, total=total) != file.sha256:
            faults.append(f"{file.path} has another SHA-256")
        done += file.num_bytes
    if faults:
        raise ModelLoadFailed(f"{manifest.name} is damaged: {'; '.join(faults)}. Remove it and pull it again.")
    return stored(directory, manifest)
