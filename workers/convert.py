"""Turns a GGUF file into a Hugging Face directory: `python -m workers.convert SRC.gguf DST_DIR [--json]`.

Above it: the model store (`orchestrator.store`), which runs this as a process of its own, reads one JSON object a
line from stdout and publishes the directory. Below it: `convert_config` (GGUF fields to config.json),
`convert_tokenizer` (GGUF fields to tokenizer files), and for architectures that are not in our table
`convert_fallback`, the only part that needs torch and transformers.

Weights come out as bf16 safetensors. They are unpacked a few million values at a time straight into the output
file, so that memory stays flat whatever the size of the model.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader
from gguf.quants import dequantize

from workers.convert_config import UnsupportedGguf, config_json, generation_config_json, heads, read_fields
from workers.convert_tokenizer import write_tokenizer

_CHUNK_VALUES = 8 * 2**20
_ARCHITECTURES = ("llama", "qwen2", "qwen3")

_TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")
_NOT_WEIGHTS = {"rope_freqs.weight"}
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_COMPARED_ROWS = 512
_SAME_COSINE = 0.95

Report = Callable[[int, int], None]
"""Called with (bytes written, bytes in all or 0 while that is not known)."""


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor of the output file, and where its values come from.

    Attributes:
        name: the Hugging Face name.
        shape: row-major, outermost first.
        data: quantized rows `(rows, bytes or values of a row)`, or a plain vector.
        quantization: the GGML type of `data`.
    """

    name: str
    shape: tuple[int, ...]
    data: npt.NDArray[Any]
    quantization: Any

    @property
    def num_bytes(self) -> int:
        """Bytes in bf16."""
        return 2 * int(np.prod(self.shape))


def hf_name(gguf_name: str) -> str | None:
    """Return the Hugging Face name of a tensor; None if it has none in the architectures we map."""
    if match := _LAYER_TENSOR.fullmatch(gguf_name):
        layer, part, kind = match.groups()
        return f"model.layers.{layer}.{_LAYER_TENSOR_NAMES[part]}.{kind}" if part in _LAYER_TENSOR_NAMES else None
    stem, _, kind = gguf_name.rpartition(".")
    return f"{_TENSOR_NAMES[stem]}.{kind}" if stem in _TENSOR_NAMES else None


def rope_row_order(num_rows: int, num_heads: int) -> npt.NDArray[np.int64]:
    """Return which GGUF row becomes each Hugging Face row of a llama q or k projection.

    GGUF keeps the two halves of each rotary pair side by side; Hugging Face keeps all first halves of a head, then
    all second halves.
    """
    pairs = num_rows // num_heads // 2
    return np.arange(num_rows).reshape(num_heads, pairs, 2).swapaxes(1, 2).reshape(-1)


def plan_tensors(reader: GGUFReader, fields: dict[str, Any]) -> list[TensorPlan]:
    """Return what the output file will hold, in file order.

    Raises:
        UnsupportedGguf: a tensor that the architectures in our table do not have.
    """
    architecture = fields["general.architecture"]
    num_heads, num_kv_heads = heads(fields)
    plans = []
    for tensor in reader.tensors:
        if tensor.name in _NOT_WEIGHTS:
            continue
        name = hf_name(tensor.name)
        if name is None or (architecture == "llama" and name.endswith(".bias")):
            raise UnsupportedGguf(f"tensor {tensor.name!r} of architecture {architecture!r} has no known place")
        data = tensor.data
        if architecture == "llama" and ".self_attn.q_proj." in name:
            data = data[rope_row_order(data.shape[0], num_heads)]
        elif architecture == "llama" and ".self_attn.k_proj." in name:
            data = data[rope_row_order(data.shape[0], num_kv_heads)]
        shape = tuple(int(size) for size in reversed(tensor.shape))
        plans.append(TensorPlan(name, shape, data, tensor.tensor_type))
    return retie(plans)


def retie(plans: list[TensorPlan]) -> list[TensorPlan]:
    """Return `plans` without the output projection if that is the token embedding, quantized another time.

    Files often carry both, since llama.cpp wants the output in better quality; the better one is kept for both uses.
    """
    embedding = next((plan for plan in plans if plan.name == _EMBEDDING), None)
    output = next((plan for plan in plans if plan.name == _OUTPUT), None)
    if embedding is None or output is None or embedding.shape != output.shape or not _are_alike(embedding, output):
        return plans
    best = max(embedding, output, key=lambda plan: plan.data.nbytes)
    return [replace(best, name=_EMBEDDING) if plan is embedding else plan for plan in plans if plan is not output]


def _are_alike(one: TensorPlan, other: TensorPlan) -> bool:
    """Return whether two matrices are equal but for quantization, judging by rows spread over both."""
    rows = np.unique(np.linspace(0, one.shape[0] - 1, _COMPARED_ROWS, dtype=np.int64))
    a, b = (dequantize(plan.data[rows], plan.quantization).astype(np.float64) for plan in (one, other))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = (a * b).sum(axis=1)[norms > 0] / norms[norms > 0]
    # 2-bit quantization keeps about 0.97; separately trained matrices are far below.
    return bool(cosines.size) and float(np.median(cosines)) > _SAME_COSINE


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Return the bf16 bit patterns of finite float32 values, rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def _chunks(plan: TensorPlan) -> Iterator[bytes]:
    if len(plan.shape) == 1:
        yield to_bfloat16(dequantize(plan.data, plan.quantization)).tobytes()
        return
    rows = max(1, _CHUNK_VALUES // plan.shape[-1])
    for start in range(0, plan.data.shape[0], rows):
        yield to_bfloat16(dequantize(plan.data[start : start + rows], plan.quantization)).tobytes()


def write_safetensors(plans: list[TensorPlan], path: Path, report: Report) -> None:
    """Write all tensors to one safetensors file (8-byte header length, JSON header, bytes), calling `report`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for plan in plans:
        header[plan.name] = {
            "dtype": "BF16",
            "shape": list(plan.shape),
            "data_offsets": [total, total + plan.num_bytes],
        }
        total += plan.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    done = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for plan in plans:
            for chunk in _chunks(plan):
                file.write(chunk)
                done += len(chunk)
            report(done, total)
        file.flush()
        os.fsync(file.fileno())


def convert(source: Path, destination: Path, report: Report) -> None:
    """Write `source` into `destination` (made if missing): weights, config, generation config, tokenizer.

    Raises:
        UnsupportedGguf: what the file holds cannot be served.
        ValueError: not a GGUF file, or a damaged one.
        OSError: reading or writing failed, for example for lack of space.
    """
    destination.mkdir(parents=True, exist_ok=True)
    report(0, 0)
    reader, fields = _read(source)
    if fields.get("general.architecture") in _ARCHITECTURES:
        try:
            plans = plan_tensors(reader, fields)
            config = config_json(fields, {plan.name: plan.shape for plan in plans}, _rope_factors(reader))
        except UnsupportedGguf:
            plans = []
        if plans:
            write_safetensors(plans, destination / "model.safetensors", report)
            _write_json(destination / "config.json", config)
            _write_json(destination / "generation_config.json", generation_config_json(fields))
            write_tokenizer(fields, source, destination)
            return
    from workers.convert_fallback import convert_with_transformers

    convert_with_transformers(source, destination, fields, report)
    write_tokenizer(fields, source, destination)


def _read(source: Path) -> tuple[GGUFReader, dict[str, Any]]:
    try:
        reader = GGUFReader(source)
        return reader, read_fields(reader)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        # The reader trusts the lengths in the file; a damaged one makes it fail in any of these ways.
        raise ValueError("it is damaged or cut short") from error


def _rope_factors(reader: GGUFReader) -> list[float] | None:
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            return [float(value) for value in tensor.data]
    return None


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _say(event: dict[str, Any], as_json: bool) -> None:
    if as_json:
        text = json.dumps(event)
    elif event["stage"] == "convert":
        text = f"convert {event['done_bytes'] // 2**20} of {event['total_bytes'] // 2**20} MiB"
    else:
        text = event.get("message") or f"done: {event['path']}"
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m workers.convert", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the .gguf file")
    parser.add_argument("destination", type=Path, help="directory to write")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(argv)

    def report(done: int, total: int) -> None:
        event = {"stage": "convert", "done_bytes": done, "total_bytes": total, "detail": options.source.name}
        _say(event, options.json)

    try:
        convert(options.source, options.destination, report)
    except (UnsupportedGguf, ValueError, KeyError, OSError, ImportError) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        message = f"{options.source.name} could not be converted: {cause}."
        reason = "invalid_request" if isinstance(error, UnsupportedGguf) else "model_load_failed"
        _say({"stage": "error", "reason": reason, "message": message}, options.json)
        return 1
    _say({"stage": "done", "path": str(options.destination.resolve()), "name": options.source.stem}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
