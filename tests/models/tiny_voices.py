"""Tiny models that speak: a random VITS of transformers, and a "Piper voice" whose ONNX graph hums a tone.

Above: tests of the speaking engine and of the store. Below: torch and transformers for the one; for the other the ONNX
file format (github.com/onnx/onnx, `onnx.proto`), written by hand: half a page instead of a package.
"""

from __future__ import annotations

import json
import math
import string
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RATE_HZ = 16_000
SAMPLES_PER_SYMBOL = 64
"""The humming voice makes so many of each symbol at speed 1."""
_FLOAT, _INT64 = 1, 7


def tiny_vits(directory: Path, num_speakers: int = 1) -> Path:
    """Build a VITS with random weights that reads lower-case letters, as MMS's English model does."""
    import torch
    from transformers import VitsConfig, VitsModel

    directory.mkdir(parents=True, exist_ok=True)
    symbols = ["|", *" '-", *string.ascii_lowercase]
    (directory / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(symbols)}), encoding="utf-8")
    options = {"add_blank": True, "normalize": True, "phonemize": False, "is_uroman": False, "pad_token": "|"}
    options |= {"unk_token": "|", "tokenizer_class": "VitsTokenizer"}  # type: ignore[dict-item]
    (directory / "tokenizer_config.json").write_text(json.dumps(options), encoding="utf-8")
    config: Any = VitsConfig(
        vocab_size=len(symbols),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=32,
        flow_size=16,
        spectrogram_bins=9,
        prior_encoder_num_flows=1,
        prior_encoder_num_wavenet_layers=1,
        posterior_encoder_num_wavenet_layers=1,
        duration_predictor_num_flows=1,
        duration_predictor_filter_channels=16,
        depth_separable_num_layers=1,
        upsample_initial_channel=16,
        upsample_rates=(8, 8),
        upsample_kernel_sizes=(16, 16),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3),),
        num_speakers=num_speakers,
        speaker_embedding_size=8 if num_speakers > 1 else 0,
        sampling_rate=RATE_HZ,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        VitsModel(config).eval().save_pretrained(directory)
    return directory


def tiny_piper(directory: Path, speakers: Sequence[str] = (), *, phonemes: str = "text", **config: Any) -> Path:
    """Build a voice that hums: 200 Hz for the first speaker, 100 more for each after it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "hum.onnx").write_bytes(_humming(has_speakers=len(speakers) > 1))
    symbols = ["_", "^", "$", *" ,.!?'", *string.ascii_lowercase]
    described = {
        "audio": {"sample_rate": RATE_HZ},
        "espeak": {"voice": "en-us"},
        "phoneme_type": phonemes,
        "num_symbols": len(symbols),
        "num_speakers": max(1, len(speakers)),
        "inference": {"noise_scale": 0.667, "length_scale": 1.0, "noise_w": 0.8},
        "phoneme_id_map": {c: [i] for i, c in enumerate(symbols)},
        "speaker_id_map": {name: i for i, name in enumerate(speakers)} if len(speakers) > 1 else {},
        "hop_length": SAMPLES_PER_SYMBOL,
        "dataset": "hum",
        **config,
    }
    (directory / "hum.onnx.json").write_text(json.dumps(described), encoding="utf-8")
    return directory


def _humming(*, has_speakers: bool) -> bytes:
    """Return a model: sin(2π f t) for lengths × 64 × length_scale samples, f by the speaker."""
    step = 2 * math.pi * 100 / RATE_HZ
    constants = [
        _tensor("one_index", _INT64, [1], struct.pack("<q", 1)),
        _tensor("samples", _FLOAT, [1], struct.pack("<f", SAMPLES_PER_SYMBOL)),
        _tensor("zero", _FLOAT, [], struct.pack("<f", 0)),
        _tensor("one", _FLOAT, [], struct.pack("<f", 1)),
        _tensor("two", _FLOAT, [1], struct.pack("<f", 2)),
        _tensor("no_sid", _INT64, [1], struct.pack("<q", 0)),
        _tensor("step", _FLOAT, [1], struct.pack("<f", step)),
        _tensor("axes", _INT64, [2], struct.pack("<qq", 0, 1)),
    ]
    nodes = [
        _node("Gather", ["scales", "one_index"], ["length"]),
        _node("Cast", ["input_lengths"], ["symbols"], to=_FLOAT),
        _node("Mul", ["symbols", "length"], ["scaled"]),
        _node("Mul", ["scaled", "samples"], ["total"]),
        _node("Squeeze", ["total"], ["end"]),
        _node("Range", ["zero", "end", "one"], ["time"]),
        _node("Cast", ["sid" if has_speakers else "no_sid"], ["speaker"], to=_FLOAT),
        _node("Add", ["speaker", "two"], ["hundreds"]),
        _node("Mul", ["hundreds", "step"], ["turn"]),
        _node("Mul", ["time", "turn"], ["phase"]),
        _node("Sin", ["phase"], ["wave"]),
        _node("Unsqueeze", ["wave", "axes"], ["output"]),
    ]
    inputs = [("input", _INT64, ["b", "n"]), ("input_lengths", _INT64, ["b"]), ("scales", _FLOAT, [3])]
    inputs += [("sid", _INT64, ["b"])] if has_speakers else []
    graph = b"".join(_bytes(1, node) for node in nodes) + _bytes(2, b"hum")
    graph += b"".join(_bytes(5, tensor) for tensor in constants)
    graph += b"".join(_bytes(11, _value(*value)) for value in inputs)  # type: ignore[arg-type]
    graph += _bytes(12, _value("output", _FLOAT, ["b", "c", "t"]))
    return _int(1, 8) + _bytes(7, graph) + _bytes(8, _bytes(1, b"") + _int(2, 17))


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _int(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _tensor(name: str, kind: int, shape: Sequence[int], data: bytes) -> bytes:
    return b"".join(_int(1, n) for n in shape) + _int(2, kind) + _bytes(8, name.encode()) + _bytes(9, data)


def _node(kind: str, inputs: Sequence[str], outputs: Sequence[str], **integers: int) -> bytes:
    node = b"".join(_bytes(1, name.encode()) for name in inputs) + b"".join(_bytes(2, n.encode()) for n in outputs)
    node += _bytes(4, kind.encode())
    return node + b"".join(_bytes(5, _bytes(1, k.encode()) + _int(3, v) + _int(20, 2)) for k, v in integers.items())


def _value(name: str, kind: int, shape: Sequence[str | int]) -> bytes:
    dims = b"".join(_bytes(1, _int(1, d) if isinstance(d, int) else _bytes(2, d.encode())) for d in shape)
    return _bytes(1, name.encode()) + _bytes(2, _bytes(1, _int(1, kind) + _bytes(2, dims)))
