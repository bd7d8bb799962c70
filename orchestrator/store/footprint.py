"""How much memory a model will take, from its safetensors headers and config.json alone.

Above it: the orchestrator's ledger (an estimate until the worker has measured) and `publish` (which refuses damaged
weights). Below it: files. The safetensors layout is 8 bytes of little-endian header length, a JSON header, and data.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostler.errors import InvalidRequest, ModelLoadFailed

from orchestrator.store.piper import check_voice, voice_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"

_MAX_HEADER_BYTES = 100 * 10**6
_MAX_JSON_BYTES = 64 * 10**6
"""Indexes of the largest models have a few megabytes."""
_STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_SERVED_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SERVED_DTYPE = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PROCESS_BYTES = 264 * 10**6
_TOKEN_BYTES = 300
_CHUNK_TOKENS = 256
_BATCH = 16
_LOGITS_AT_ONCE = 4
_INT4_GROUP = 32
_PANEL_ROWS = 16
_RANK_STEP = 16
SPEECH_BYTES = 300 * 10**6
"""What making sound of the longest piece takes beside the weights."""
_HEARING_BYTES = 300 * 10**6
"""100 MB of modules, tokenizer and filters once a speech model is loaded; 200 MB that the allocator keeps of uploads,
features and attention once eight recordings have been heard at a time."""
_KERNEL_FAMILIES = frozenset(
    {
        "llama", "mistral", "ministral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "smollm3", "gemma", "gemma3_text",
        "granite",
    }
)  # fmt: skip
"""Model types that workers run in their own kernels on a CPU, which quantize embeddings and experts, too, and int4
otherwise."""

_OUTER = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|lm_head)\.")
"""Embeddings and the head: the kernels keep them in int8 at the least, torch as they are."""
_FUSED_EXPERT = re.compile(r"\.experts\.")
"""Stored one by one, but loaded as one tensor for all experts, which is no linear layer and is not quantized."""
_ROUTER = re.compile(r"\.(mlp|block_sparse_moe)\.gate\.weight$")
"""What chooses experts is never quantized."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Estimated bytes of one loaded model.

    Attributes:
        weight_bytes: every tensor in the serving dtype, a tied output projection counted once; of a quantized model
            the matrices of linear layers in int8 with a scale for each row, or int4 with one for each 32 weights.
            Embeddings, head, experts, routers and vectors stay in the dtype. Where the CPU's kernels run it, experts
            are quantized, too, embeddings and the head are int8 at the least, scales are float32, int4 has a least
            weight beside each, routers are float32, and rows come in sixteens.
        kv_bytes_per_token: 2 (keys, values) x layers x key-value heads x head size x bytes of the dtype.
        max_context_tokens: what the model was trained for; 0 if its config does not say.
        workspace_bytes: 264 MB, plus 300 bytes for each token of the vocabulary (tokenizer), plus fp32 activations of
            one 256-token prefill chunk (8 hidden-sized and 3 intermediate-sized buffers), plus fp32 logits and
            probabilities of a batch of 16.

    The 264 MB are what a worker's process holds of its own beside any model, which on a CPU is device memory, too:
    242 MB once torch 2.13 and transformers 5.23 are imported, 40 MB more where the load went through transformers' own
    definition of the model, the first one does. On a GPU the same number stands for CUDA's context and libraries.
    """

    weight_bytes: int
    kv_bytes_per_token: int
    max_context_tokens: int
    workspace_bytes: int


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as a safetensors header describes it."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Return the tensors of one safetensors file, by name; reads only its header.

    Raises:
        ModelLoadFailed: the file is missing, damaged or cut short.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > min(_MAX_HEADER_BYTES, file_bytes - 8):
                raise ModelLoadFailed(f"{path.name} is damaged or cut short: it has only {file_bytes} bytes.")
            entries: dict[str, Any] = json.loads(file.read(header_bytes))
        entries.pop("__metadata__", None)
        tensors, end = {}, 0
        for name, entry in entries.items():
            start, stop = entry["data_offsets"]
            tensors[name] = TensorHeader(str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), stop - start)
            end = max(end, stop)
    except FileNotFoundError:
        raise ModelLoadFailed(f"{path.name} is missing from the model.") from None
    except OSError as error:
        raise ModelLoadFailed(f"{path.name} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelLoadFailed(f"{path.name} is damaged: its header is not that of a safetensors file.") from error
    if file_bytes != 8 + header_bytes + end:
        raise ModelLoadFailed(
            f"{path.name} is cut short or damaged: its header promises {8 + header_bytes + end} bytes, "
            f"the file has {file_bytes}."
        )
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a model's file.

    Raises:
        ModelLoadFailed: missing, unreadable, far too large or deep, or not an object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelLoadFailed(f"{path.name} is larger than {_MAX_JSON_BYTES} bytes.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadFailed(f"{path.name} is missing from the model.") from None
    except OSError as error:
        raise ModelLoadFailed(f"{path.name} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadFailed(f"{path.name} is not valid JSON.") from error
    if not isinstance(value, dict):
        raise ModelLoadFailed(f"{path.name} is not a JSON object.")
    return value


def read_tensors(directory: Path) -> dict[str, TensorHeader]:
    """Return every tensor that loading the model reads: of model.safetensors, else of the shards in its index.

    Raises:
        ModelLoadFailed: weights missing or damaged.
    """
    if not (directory / SINGLE).exists() and (directory / INDEX).exists():
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ModelLoadFailed(f"{INDEX} has no weight_map.")
        shards = {shard: read_header(directory / Path(shard).name) for shard in sorted(set(weight_map.values()))}
        missing = [name for name, shard in weight_map.items() if name not in shards[shard]]
        if missing:
            raise ModelLoadFailed(f"{weight_map[missing[0]]} lacks tensor {missing[0]!r}, which the index promises.")
        return {name: shards[shard][name] for name, shard in weight_map.items()}
    return read_header(directory / SINGLE)


def check_files(directory: Path) -> int:
    """Return the bytes of a model's weights, having looked at all that loading will read.

    Raises:
        ModelLoadFailed: something is missing or damaged.
    """
    if (voice := voice_file(directory)) is not None:
        return check_voice(voice)
    read_json(directory / "config.json")
    return sum(tensor.num_bytes for tensor in read_tensors(directory).values())


def _first(config: dict[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _serving_dtype(dtype: str, config: dict[str, Any], tensors: dict[str, TensorHeader]) -> str:
    if dtype == "auto":
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "")
        if dtype not in _SERVED_BYTES:
            largest = max(tensors.values(), key=lambda tensor: tensor.num_bytes, default=None)
            dtype = _SERVED_DTYPE.get(largest.dtype, "bfloat16") if largest else "bfloat16"
    if dtype not in _SERVED_BYTES:
        raise InvalidRequest(f"dtype {dtype!r} is not one of auto, {', '.join(_SERVED_BYTES)}.", param="dtype")
    return dtype


def _served_bytes(name: str, tensor: TensorHeader, item_bytes: int, quantize: str) -> int:
    """Return what one tensor takes in memory as torch's layers."""
    num_weights = math.prod(tensor.shape)
    is_matrix = len(tensor.shape) == 2 and name.endswith(".weight")
    if not quantize or not is_matrix or any(kept.search(name) for kept in (_OUTER, _ROUTER, _FUSED_EXPERT)):
        return num_weights * item_bytes
    rows, columns = tensor.shape
    if quantize == "int4" and columns % _INT4_GROUP == 0:
        return num_weights // 2 + item_bytes * (num_weights // _INT4_GROUP)
    return num_weights + item_bytes * rows


def _packed_bytes(name: str, tensor: TensorHeader, item_bytes: int, quantize: str) -> int:
    """Return what one tensor takes as the CPU's kernels pack it."""
    if len(tensor.shape) != 2:
        return math.prod(tensor.shape) * item_bytes
    rows, columns = -(-tensor.shape[0] // _PANEL_ROWS) * _PANEL_ROWS, tensor.shape[1]
    if _ROUTER.search(name):
        return 4 * rows * columns
    if quantize == "int4" and not _OUTER.search(name) and columns % _INT4_GROUP == 0:
        return rows * columns // 2 + 4 * (rows * columns // _INT4_GROUP)
    return rows * (columns + 4) if quantize else rows * columns * item_bytes


def footprint(
    path: Path, dtype: str, quantize: str = "", *, generates: bool = True, beams: int = 1, kind: str = "cpu"
) -> Footprint:
    """Return what the model in directory `path` will take when served in `dtype` ("auto": as its config says).

    Args:
        path: of the model.
        generates: it writes text. Others keep no KV cache, and "auto" is float32 for them, as on a CPU.
        dtype: "auto", "bfloat16", "float16" or "float32".
        quantize: "int8" or "int4" for the weights of linear layers; "" for none.
        beams: that a model which writes speech down follows.
        kind: of device that it is on, "cpu" or "cuda".

    Raises:
        ModelLoadFailed: files are missing or damaged.
        InvalidRequest: unknown dtype or quantization.
    """
    if quantize not in ("", "int8", "int4"):
        raise InvalidRequest(f"quantize {quantize!r} is not one of int8, int4.", param="quantize")
    if (voice := voice_file(path)) is not None:
        return Footprint(check_voice(voice), 0, 0, _PROCESS_BYTES + SPEECH_BYTES)
    outer = read_json(path / "config.json")
    nested = outer.get("text_config")
    config = {**outer, **nested} if isinstance(nested, dict) else outer
    tensors = read_tensors(path)
    if not generates and dtype == "auto":
        dtype = "float32"
    item_bytes = _SERVED_BYTES[_serving_dtype(dtype, config, tensors)]
    if config.get("tie_word_embeddings") and any(name.endswith("embed_tokens.weight") for name in tensors):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("lm_head.weight")}
    # Pictures and their towers are torch's; the kernels run plain text models.
    has_kernels = kind == "cpu" and not isinstance(nested, dict) and config.get("model_type") in _KERNEL_FAMILIES
    bytes_of = _packed_bytes if has_kernels else _served_bytes
    weight_bytes = sum(
        bytes_of(name, tensor, item_bytes, quantize) if tensor.dtype in _STORED_BYTES else tensor.num_bytes
        for name, tensor in tensors.items()
    )
    hidden = _first(config, "hidden_size", "n_embd", "d_model")
    heads = _first(config, "num_attention_heads", "n_head")
    layers = _first(config, "num_hidden_layers", "n_layer")
    head_dim = _first(config, "head_dim") or (hidden // heads if heads else 0)
    kv_heads = _first(config, "num_key_value_heads") or heads
    activations = 4 * _CHUNK_TOKENS * (8 * hidden + 3 * (_first(config, "intermediate_size", "n_inner") or 4 * hidden))
    if config.get("model_type") == "whisper":
        activations = _hearing_bytes(config, item_bytes, beams)
    if config.get("model_type") == "vits":
        activations = SPEECH_BYTES
    vocabulary = _first(config, "vocab_size")
    logits = 2 * 4 * _BATCH * vocabulary
    return Footprint(
        weight_bytes=weight_bytes,
        kv_bytes_per_token=2 * layers * kv_heads * head_dim * item_bytes if generates else 0,
        max_context_tokens=_first(config, "max_position_embeddings", "n_positions", "max_sequence_length"),
        workspace_bytes=_PROCESS_BYTES + _TOKEN_BYTES * vocabulary + activations + logits,
    )


def _hearing_bytes(config: dict[str, Any], item_bytes: int, beams: int) -> int:
    """Return what hearing takes beside Whisper's weights and any worker's own.

    A row is one window of 30 s: keys and values of what is heard, and of what each beam says. There are as many rows as
    600 MB hold, 2 … 8, whatever `max_running` is. Two windows are encoded at once: 36 times their states, in float32,
    is what the process was seen to grow by, for the allocator keeps much of what one layer has given back. Last come
    the logits of further beams.
    """
    width, layers = _first(config, "d_model"), _first(config, "decoder_layers")
    sounds, tokens = _first(config, "max_source_positions"), _first(config, "max_target_positions")
    row = 2 * layers * width * (sounds + beams * tokens) * item_bytes
    rows = max(2, min(8, 600 * 10**6 // max(1, row)))
    logits = _LOGITS_AT_ONCE * 4 * rows * (beams - 1) * _first(config, "vocab_size")
    return _HEARING_BYTES + rows * row + 2 * 36 * 4 * sounds * width + logits


def adapter_bytes(name: str, directory: Path) -> int:
    """Return what a LoRA adapter takes beside its model: its matrices in float32, each rank rounded up to 16.

    Raises:
        ModelLoadFailed: its weights are missing or damaged; the message has the adapter's name.
    """
    try:
        tensors = read_header(directory / ADAPTER)
    except ModelLoadFailed as error:
        raise ModelLoadFailed(f"Adapter {name}: {error.message}") from error
    return sum(_padded_bytes(tensor.shape) for tensor in tensors.values())


def _padded_bytes(shape: tuple[int, ...]) -> int:
    rank = min(shape, default=0)
    return 4 * math.prod(shape) // max(rank, 1) * (-(-rank // _RANK_STEP) * _RANK_STEP)
