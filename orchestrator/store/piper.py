"""Piper's voices: a directory with one `.onnx` and, beside it, its `.onnx.json`; no config.json. Checked, never run.

Above it: `kind`, `footprint`, `publish`, `source`, `hub`, which meet such directories beside transformers' own. Below
it: files. An ONNX file is one protobuf message (github.com/onnx/onnx, `onnx.proto`): data, no code. Its outline is
walked here, so that a file that was cut short, is something else, or points at other files is refused before a worker
opens it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hostler.errors import ModelLoadFailed

SUFFIX = ".onnx"
MAX_VOICE_BYTES = 2**30
MAX_CONFIG_BYTES = 2**20

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_EXTERNAL = 7, 5, 13
_MAX_FIELDS = 1_000_000


def voice_file(directory: Path) -> Path | None:
    """Return the voice that `directory` holds; None if it is another kind of model, or no model."""
    if (directory / "config.json").exists():
        return None
    voices = [path for path in sorted(directory.glob(f"*{SUFFIX}")) if config_of(path).is_file()]
    return voices[0] if len(voices) == 1 else None


def config_of(voice: Path) -> Path:
    """Return where a voice's configuration is."""
    return voice.with_name(f"{voice.name}.json")


def check_voice(voice: Path) -> int:
    """Return the bytes of a voice whose files are what they should be, as far as a look at their outline tells.

    Raises:
        ModelLoadFailed: too large, cut short, no ONNX file, or its weights are in other files.
    """
    try:
        num_bytes = voice.stat().st_size
        if num_bytes > MAX_VOICE_BYTES or config_of(voice).stat().st_size > MAX_CONFIG_BYTES:
            raise ModelLoadFailed(f"{voice.name} is larger than any Piper voice.")
        with voice.open("rb") as file:
            graphs = 0
            for number, begin, end in _fields(file, 0, num_bytes):
                if number == _MODEL_GRAPH:
                    graphs += 1
                    _check_graph(file, begin, end, voice.name)
    except OSError as error:
        raise ModelLoadFailed(f"{voice.name} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ModelLoadFailed(f"{voice.name} is cut short, damaged, or no ONNX file.") from error
    if graphs != 1:
        raise ModelLoadFailed(f"{voice.name} is cut short, damaged, or no ONNX file.")
    return num_bytes


def _check_graph(file: BinaryIO, begin: int, end: int, name: str) -> None:
    for number, tensor_begin, tensor_end in _fields(file, begin, end):
        if number == _GRAPH_INITIALIZER:
            for inner, _, _ in _fields(file, tensor_begin, tensor_end):
                if inner == _TENSOR_EXTERNAL:
                    raise ModelLoadFailed(f"{name} keeps weights in other files, which no Piper voice does.")


def _fields(file: BinaryIO, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (field number, begin, end) of a message's fields.

    Raises:
        ValueError: it is no message.
    """
    at = begin
    for _ in range(_MAX_FIELDS):
        if at == end:
            return
        tag, at = _varint(file, at, end)
        number, kind = tag >> 3, tag & 7
        if kind == _BYTES:
            length, at = _varint(file, at, end)
        elif kind == _VARINT:
            _, after = _varint(file, at, end)
            length = after - at
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError("unknown wire type")
        if not number or at + length > end:
            raise ValueError("a field is cut short")
        yield number, at, at + length
        at += length
    raise ValueError("too many fields")


def _varint(file: BinaryIO, at: int, end: int) -> tuple[int, int]:
    file.seek(at)
    value = 0
    for index, byte in enumerate(file.read(min(10, end - at))):
        value |= (byte & 127) << (7 * index)
        if byte < 128:
            return value, at + index + 1
    raise ValueError("a number is cut short")
