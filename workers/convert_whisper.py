"""Turns a CTranslate2 Whisper directory into a Hugging Face one: `python -m workers.convert_whisper SRC DST [--json]`.

Above it: the model store (`orchestrator.store`), which runs this as a process of its own, reads one JSON object a line
from stdout and publishes the directory. Below it: numpy and safetensors; no torch. A source has `model.bin` (or
`model.bin.part1`, `.part2` … of one that was split), `config.json` and `tokenizer.json`.

`model.bin`, all little-endian: u32 version, name of the specification, u32 revision, u32 number of tensors; each tensor
its name, u8 rank, u32 sizes, u8 type, u32 bytes, data; then u32 number of aliases, each two names. A name is u16 length
with a final NUL. Types: 0 float32, 1 int8, 2 int16, 3 int32, 4 float16, 5 bfloat16.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Tensors = dict[str, npt.NDArray[Any]]

_MAX_TENSORS = 20_000
_TYPES: dict[int, Any] = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16, 5: np.uint16}
_BFLOAT16 = 5
_FIXED = {
    "encoder/conv1": "encoder.conv1",
    "encoder/conv2": "encoder.conv2",
    "encoder/position_encodings/encodings": "encoder.embed_positions.weight",
    "encoder/layer_norm": "encoder.layer_norm",
    "decoder/embeddings": "decoder.embed_tokens",
    "decoder/position_encodings/encodings": "decoder.embed_positions.weight",
    "decoder/layer_norm": "decoder.layer_norm",
}
_PARTS: dict[str, tuple[str, ...]] = {
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
_KINDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
_LAYER = re.compile(r"(encoder|decoder)/layer_(\d+)/(.+)/(weight|bias|gamma|beta)")
_LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")


def read_model(file: io.BufferedIOBase) -> Tensors:
    """Return the tensors of a `model.bin` of a Whisper model.

    Raises:
        ValueError: it is not one, is damaged, or is packed in a way that is not known here.
    """

    def number(form: str) -> int:
        size = struct.calcsize(form)
        data = file.read(size)
        if len(data) != size:
            raise ValueError("it is cut short")
        return int(struct.unpack(form, data)[0])

    def name() -> str:
        length = number("<H")
        return file.read(length)[: length - 1].decode("utf-8")

    version = number("<I")
    if not 4 <= version <= 6 or name() != "WhisperSpec":
        raise ValueError("it is not a CTranslate2 Whisper model")
    number("<I")
    num_tensors = number("<I")
    if num_tensors > _MAX_TENSORS:
        raise ValueError("it is damaged")
    tensors: Tensors = {}
    for _ in range(num_tensors):
        key, rank = name(), number("<B")
        shape = tuple(number("<I") for _ in range(rank))
        kind, num_bytes = number("<B"), number("<I")
        dtype = _TYPES.get(kind)
        if dtype is None or num_bytes != int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize:
            raise ValueError(f"the type of {key[:80]!r} is not known")
        data = file.read(num_bytes)
        if len(data) != num_bytes:
            raise ValueError("it is cut short")
        values = np.frombuffer(data, dtype).reshape(shape)
        if kind == _BFLOAT16:
            values = (values.astype(np.uint32) << 16).view(np.float32)
        tensors[key] = values
    return tensors


def unquantized(tensors: Tensors) -> Tensors:
    """Return the tensors with int8 weights multiplied out (value / scale of its row), as float16."""
    plain: Tensors = {}
    for key, values in tensors.items():
        if key.endswith("_scale"):
            continue
        if values.dtype == np.int8 and values.ndim:
            scale = tensors.get(f"{key}_scale")
            if scale is None:
                raise ValueError(f"{key[:80]!r} has no scale")
            rows = scale.astype(np.float32).reshape(-1, *([1] * (values.ndim - 1)))
            values = (values.astype(np.float32) / rows).astype(np.float16)
        elif values.dtype == np.int16 and values.ndim:
            raise ValueError("its weights are int16, which is not read here")
        plain[key] = values
    return plain


def renamed(tensors: Tensors) -> Tensors:
    """Return the tensors under the names of transformers' Whisper; joined projections are split, k has no bias."""
    named: Tensors = {}
    for key, values in tensors.items():
        if match := _LAYER.fullmatch(key):
            side, layer, part, kind = match.groups()
            targets = _PARTS.get(part)
            if targets is None:
                raise ValueError(f"the tensor {key[:80]!r} has no known place")
            for target, piece in zip(targets, np.split(values, len(targets)), strict=True):
                if not (target.endswith("k_proj") and kind == "bias"):
                    full = f"model.{side}.layers.{layer}.{target}.{_KINDS[kind]}"
                    named[full] = np.ascontiguousarray(piece)
            continue
        stem, _, kind = key.rpartition("/")
        if key in _FIXED:
            named[f"model.{_FIXED[key]}"] = values
        elif stem in _FIXED and kind in _KINDS:
            named[f"model.{_FIXED[stem]}.{_KINDS[kind]}"] = values
    return named


def config_json(tensors: Tensors, named: Tensors, ids: dict[str, int]) -> dict[str, Any]:
    """Return config.json; sizes are read off the tensors."""

    def layers(side: str) -> int:
        return 1 + max(int(m[1]) for n in named if (m := re.match(rf"model\.{side}\.layers\.(\d+)\.", n)))

    vocabulary, width = named["model.decoder.embed_tokens.weight"].shape
    end = ids["<|endoftext|>"]
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "vocab_size": vocabulary,
        "d_model": width,
        "num_mel_bins": named["model.encoder.conv1.weight"].shape[1],
        "encoder_layers": layers("encoder"),
        "decoder_layers": layers("decoder"),
        "encoder_attention_heads": int(tensors["encoder/num_heads"]),
        "decoder_attention_heads": int(tensors["decoder/num_heads"]),
        "encoder_ffn_dim": named["model.encoder.layers.0.fc1.weight"].shape[0],
        "decoder_ffn_dim": named["model.decoder.layers.0.fc1.weight"].shape[0],
        "max_source_positions": named["model.encoder.embed_positions.weight"].shape[0],
        "max_target_positions": named["model.decoder.embed_positions.weight"].shape[0],
        "activation_function": "gelu",
        "scale_embedding": False,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "dtype": {np.dtype(np.float32): "float32"}.get(named["model.encoder.conv1.weight"].dtype, "float16"),
    }


def generation_config_json(source: dict[str, Any], ids: dict[str, int], vocabulary: int) -> dict[str, Any]:
    """Return generation_config.json. Without `task` transformers cuts what a multilingual model says short."""
    multilingual = vocabulary >= 51_865
    end = ids["<|endoftext|>"]
    config: dict[str, Any] = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "is_multilingual": multilingual,
        "return_timestamps": False,
        "max_initial_timestamp_index": 50,
        "max_length": 448,
        "suppress_tokens": source.get("suppress_ids", []),
        "begin_suppress_tokens": source.get("suppress_ids_begin", []),
        "alignment_heads": source.get("alignment_heads", []),
    }
    if multilingual:
        config["task"] = "transcribe"
        config["task_to_id"] = {"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]}
        config["lang_to_id"] = {token: number for token, number in ids.items() if _LANGUAGE.fullmatch(token)}
    return config


def write_tokenizer(tokenizer: dict[str, Any], ids: dict[str, int], destination: Path) -> None:
    """Write the tokenizer's files. `<|notimestamps|>` stays the last special token: times are counted from there."""
    first = ids["<|notimestamps|>"] + 1
    have = set(ids.values())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    times = [
        {"id": first + step, "content": f"<|{step * 0.02:.2f}|>", **plain}
        for step in range(1501)
        if first + step not in have
    ]
    tokenizer = {**tokenizer, "added_tokens": [*tokenizer["added_tokens"], *times]}
    _write_json(destination / "tokenizer.json", tokenizer)
    special = sorted((number, token) for token, number in ids.items() if number < first and token != "<|endoftext|>")
    _write_json(
        destination / "tokenizer_config.json",
        {
            "tokenizer_class": "WhisperTokenizer",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": [token for _, token in special],
            "add_prefix_space": False,
            "errors": "replace",
            "model_max_length": 1024,
            "return_attention_mask": False,
        },
    )


def convert(source: Path, destination: Path) -> None:
    """Write the model in `source` into `destination` (made if missing).

    Raises:
        ValueError: it is not a CTranslate2 Whisper model, or is damaged.
        OSError: reading or writing failed.
    """
    destination.mkdir(parents=True, exist_ok=True)
    parts = [source / "model.bin"]
    if not parts[0].is_file():
        parts = sorted(source.glob("model.bin.part*"), key=lambda path: int(path.suffix.removeprefix(".part") or 0))
    if not parts:
        raise ValueError("it has no model.bin")
    data = b"".join(path.read_bytes() for path in parts)
    tensors = unquantized(read_model(io.BytesIO(data)))
    del data
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {str(token["content"]): int(token["id"]) for token in tokenizer["added_tokens"]}
    described = json.loads((source / "config.json").read_text(encoding="utf-8"))
    named = renamed(tensors)
    config = config_json(tensors, named, ids)
    weights = destination / "model.safetensors"
    save_file(named, weights, {"format": "pt"})
    weights.chmod(0o644)  # safetensors keeps others out
    _write_json(destination / "config.json", config)
    _write_json(
        destination / "generation_config.json", generation_config_json(described, ids, int(config["vocab_size"]))
    )
    _write_json(
        destination / "preprocessor_config.json",
        {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": config["num_mel_bins"],
            "sampling_rate": 16000,
            "hop_length": 160,
            "chunk_length": 30,
            "n_fft": 400,
            "n_samples": 480000,
            "nb_max_frames": 3000,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": False,
        },
    )
    write_tokenizer(tokenizer, ids, destination)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m workers.convert_whisper", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the CTranslate2 directory")
    parser.add_argument("destination", type=Path, help="directory to write")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(argv)
    event: dict[str, Any]
    try:
        convert(options.source, options.destination)
        event = {"stage": "done", "path": str(options.destination.resolve()), "name": options.source.name}
    except (ValueError, KeyError, TypeError, OSError) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        message = f"{options.source.name} could not be converted: {cause}."
        event = {"stage": "error", "reason": "model_load_failed", "message": message}
    text = json.dumps(event) if options.json else event.get("message") or f"done: {event['path']}"
    sys.stdout.write(text + "\n")
    return 1 if event["stage"] == "error" else 0


if __name__ == "__main__":
    sys.exit(main())
