"""What a repository on the Hub holds, and which of its files we take.

Above it: `pull` and `download` (which brings the bytes). Below it: huggingface_hub, for the repository's description,
its settings and the user's token.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import Protocol

import httpx
from hostler.errors import InvalidRequest, ModelNotFound, PermissionDenied, Unavailable

from orchestrator.store.piper import MAX_VOICE_BYTES, SUFFIX

_CONNECT_TIMEOUT_S = 3.0
_READ_TIMEOUT_S = 30.0
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
# What transformers keeps beside a tokenizer, and sentence-transformers for each step after the transformer.
_NESTED = re.compile(r"additional_chat_templates/[\w.-]+\.jinja|\d+_\w+/(config\.json|model\.safetensors)")
_SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a repository.

    Attributes:
        path: inside the repository.
        num_bytes: its size.
        sha256: of large files (LFS); None for those kept in git.
        git_sha1: the git blob id of files kept in git.
    """

    path: str
    num_bytes: int
    sha256: str | None
    git_sha1: str | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A repository at one commit, or one folder of it: then the files' paths begin there."""

    hub_id: str
    commit: str
    files: tuple[RemoteFile, ...]
    folder: str = ""

    def within(self, folder: str) -> Snapshot:
        """Return what is in a folder; all, if it is empty.

        Raises:
            ModelNotFound: there is no such folder.
        """
        if not folder:
            return self
        start = f"{folder}/"
        files = tuple(replace(f, path=f.path.removeprefix(start)) for f in self.files if f.path.startswith(start))
        if not files:
            raise ModelNotFound(f"{self.hub_id} has no folder {folder[:120]!r}.", param="model")
        return replace(self, files=files, folder=folder)


class Hub(Protocol):
    """What the store needs of a hub. Above: `download.fetch`. Below: HTTP, or a fake in tests."""

    def snapshot(self, hub_id: str, revision: str | None) -> Snapshot:
        """Resolve a revision to a commit and list its files."""

    def url_and_headers(self, snapshot: Snapshot, path: str) -> tuple[str, dict[str, str]]:
        """Return where a file's bytes are, and what to send with the request."""


class HuggingFaceHub:
    """The Hub that huggingface_hub is configured for (HF_ENDPOINT, HF_TOKEN and so on are honoured)."""

    def __init__(self) -> None:
        # Imported late: find() and list must stay quick.
        import huggingface_hub
        from huggingface_hub import constants

        self._hub = huggingface_hub
        self._endpoint: str = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
        self._api = huggingface_hub.HfApi(endpoint=self._endpoint, library_name="hostler")
        self.is_offline: bool = constants.HF_HUB_OFFLINE

    def is_reachable(self) -> bool:
        """Say within a few seconds whether the Hub answers at all."""
        if self.is_offline:
            return False
        try:
            httpx.head(self._endpoint, timeout=_CONNECT_TIMEOUT_S)
        except httpx.HTTPError:
            return False
        return True

    def snapshot(self, hub_id: str, revision: str | None) -> Snapshot:
        """Resolve a revision to a commit and list its files.

        Raises:
            ModelNotFound, PermissionDenied, Unavailable.
        """
        from huggingface_hub import errors

        if self.is_offline:
            raise Unavailable(f"{hub_id} is not stored here and HF_HUB_OFFLINE forbids asking the Hub.")
        try:
            info = self._api.model_info(hub_id, revision=revision, files_metadata=True, timeout=_READ_TIMEOUT_S)
        except errors.GatedRepoError as error:
            raise PermissionDenied(
                f"{hub_id} is gated: accept its terms on the Hub, then set HF_TOKEN or run `hf auth login`."
            ) from error
        except errors.RevisionNotFoundError as error:
            raise ModelNotFound(f"{hub_id} has no revision {revision!r}.", param="revision") from error
        except errors.RepositoryNotFoundError as error:
            raise ModelNotFound(
                f"The Hub has no model {hub_id!r} (or it is private and needs HF_TOKEN).", param="model"
            ) from error
        except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError, httpx.HTTPError) as error:
            raise Unavailable(f"The Hub cannot be reached or does not answer ({type(error).__name__}).") from error
        except Exception as error:
            # huggingface_hub does not wrap its HTTP library's errors, and which library that is changes.
            if "http" not in type(error).__module__:
                raise
            raise Unavailable(f"The Hub cannot be reached ({type(error).__name__}).") from error
        files = []
        for sibling in info.siblings or ():
            lfs = sibling.lfs
            files.append(RemoteFile(sibling.rfilename, sibling.size or 0, lfs.sha256 if lfs else None, sibling.blob_id))
        if not info.sha:
            raise Unavailable(f"The Hub did not say which commit of {hub_id} it means.")
        return Snapshot(hub_id, info.sha, tuple(files))

    def url_and_headers(self, snapshot: Snapshot, path: str) -> tuple[str, dict[str, str]]:
        """Return where a file's bytes are, and what to send with the request."""
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not in __all__

        path = f"{snapshot.folder}/{path}" if snapshot.folder else path
        url = self._hub.hf_hub_url(snapshot.hub_id, path, revision=snapshot.commit, endpoint=self._endpoint)
        return url, build_hf_headers(library_name="hostler")


def choose_files(snapshot: Snapshot, trust_remote_code: bool) -> tuple[list[RemoteFile], list[RemoteFile]]:
    """Return the files that serving needs: (config and tokenizer, safetensors weights).

    Python files only when they are trusted. Of folders only those count that hold further templates or steps of
    an embedding model, so that copies in other formats (`onnx/`, `original/`) stay where they are. Of a Piper voice
    they are its two files.

    Raises:
        InvalidRequest: no safetensors weights, or no config.
    """
    top = [file for file in snapshot.files if "/" not in file.path and not file.path.startswith(".")]
    if (voice := _voice_files(snapshot.hub_id, top)) is not None:
        return voice
    tensors = [file for file in top if file.path.endswith(".safetensors") and not file.path.startswith("consolidated")]
    weights = [file for file in tensors if _WEIGHTS.fullmatch(file.path)]
    if any(file.path == "model.safetensors" for file in weights):
        weights = [file for file in weights if file.path == "model.safetensors"]
    names = {file.path for file in top}
    if not weights and "model.bin" in names and names & {"vocabulary.txt", "vocabulary.json"}:
        weights = [file for file in top if file.path == "model.bin"]  # CTranslate2's, a plain format; to be converted
    if not weights:
        raise InvalidRequest(
            f"{snapshot.hub_id} has no safetensors weights (model.safetensors), and other formats can run code when "
            "they are opened, so it is not pulled. Look for a safetensors version or revision.",
            param="model",
        )
    suffixes = (*_SIDE_SUFFIXES, ".py") if trust_remote_code else _SIDE_SUFFIXES
    sides = [file for file in top if file.path.endswith(suffixes)]
    sides += [f for f in snapshot.files if _NESTED.fullmatch(f.path)]
    if not any(file.path == "config.json" for file in sides):
        raise InvalidRequest(f"{snapshot.hub_id} has no config.json, so it is not a transformers model.", param="model")
    return sides, weights


def _voice_files(hub_id: str, top: list[RemoteFile]) -> tuple[list[RemoteFile], list[RemoteFile]] | None:
    """Return the files of a Piper voice, or None where there is another kind of model."""
    by_path = {file.path: file for file in top}
    voices = [path for path in by_path if path.endswith(SUFFIX) and f"{path}.json" in by_path]
    if "config.json" in by_path or not voices:
        return None
    if len(voices) > 1:
        raise InvalidRequest(f"{hub_id} holds {len(voices)} voices in one folder, so none can be told.", param="model")
    voice = by_path[voices[0]]
    if voice.num_bytes > MAX_VOICE_BYTES:
        raise InvalidRequest(f"{voice.path} of {hub_id} is larger than any Piper voice.", param="model")
    return [by_path[f"{voice.path}.json"]], [voice]
