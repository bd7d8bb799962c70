"""What a proved model was made of, kept on disk: the next load takes its weights straight from the files.

Above: `opening.py`. Below: safetensors. The first layers of a model, one of every kind, go through transformers'
module: it is described, the kernels are proved against it, and the description is written down with each tensor
replaced by its name in the checkpoint; those of the other layers are called alike but for the layer's number. A load
reads that and the files, and imports no model definition at all: seconds less. A recipe belongs to one state of the
files (sizes and times), one build of the kernels, one transformers version, one way to keep weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from workers.text.describe import Description, Layer, Mlp, Rope, Router, kinds_of_layers
from workers.text.directory import Directory

_FORMAT = 3
_NUMBERS = (
    "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "gelu", "eps", "embed_scale",
    "attention_scale", "residual_scale", "logit_scale", "norm_offset",
)  # fmt: skip
_VECTORS = ("qkv_bias", "out_bias", "norms")
# What checkpoints call a layer's router, and gate, up and down of an expert; transformers joins those of a layer.
_EXPERTS = {
    "qwen3_moe": ("mlp.gate", "mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
    "mixtral": (
        "block_sparse_moe.gate", "block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3",
        "block_sparse_moe.experts.{}.w2",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recipe:
    """A description whose weights are still in the files.

    Attributes:
        description: its weights are mapped from the files, read as they are packed.
        architecture, num_parameters: of the module that it was made from.
    """

    description: Description
    architecture: str
    num_parameters: int


def recipe_path(library: Path, directory: Directory, weights: str) -> Path:
    """Return where the recipe for a directory in its present state is kept, written or not."""
    files = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in directory.weight_files]
    parts = [_FORMAT, transformers.__version__, weights, str(directory.dtype), directory.text.to_json_string(), files]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    return library.with_name(f"{library.stem}-{digest}.recipe.safetensors")


@dataclass(frozen=True, slots=True)
class Draft:
    """A recipe not yet written: numbers and names, and the rotary frequencies, which are in no file."""

    document: dict[str, Any]
    frequencies: dict[str, torch.Tensor]

    def write(self, path: Path) -> None:
        """Write it down, whole or not at all."""
        partial = path.with_suffix(".partial")
        save_file(self.frequencies, partial, {"recipe": json.dumps(self.document)})
        partial.replace(path)


def draft(directory: Directory, description: Description, model: Any) -> Draft | None:
    """Return the recipe of a model some of whose first layers were described, at least one of every kind.

    Args:
        directory: of the whole model.
        description: of the module with those layers, `model`.

    Returns:
        None unless every tensor described stands in the files as the module has it, and one like it for each further
        layer.
    """
    names: dict[int, str] = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
    checkpoint = _Checkpoint(directory)

    def named(tensor: torch.Tensor | None, name: str = "") -> str | None:
        if tensor is None:
            return None
        name = name or names[tensor.data_ptr()]
        stored = checkpoint[name]
        if stored.shape != tensor.shape or not torch.equal(stored.to(tensor.dtype), tensor):
            raise KeyError(name)
        return name

    document: dict[str, Any] = {name: getattr(description, name) for name in _NUMBERS}
    try:
        document["final_norm"] = named(description.final_norm)
        document["head"] = named(description.head) if description.embedding is not None else None
        tied = description.head if description.embedding is None else description.embedding
        document["embedding"] = _first_stored(names, checkpoint, tied, model)
        seen = [_names(i, layer, named, model.config.model_type) for i, layer in enumerate(description.layers)]
        document["layers"] = [_names_of(i, seen, directory.text, checkpoint) for i in range(directory.kv.num_layers)]
    except KeyError:
        return None
    document["ropes"] = [rope.scaling for rope in description.ropes]
    frequencies = {f"rope.{i}": rope.frequencies.clone() for i, rope in enumerate(description.ropes)}
    sizes = {name: math.prod(checkpoint.kind(name)[0]) for name in _all_names(document)}
    document |= {"architecture": type(model).__name__, "num_parameters": sum(sizes.values())}
    return Draft(document, frequencies)


def _names(index: int, layer: Layer, named: Callable[..., str | None], model_type: str) -> dict[str, Any]:
    """Return a layer with the names of its tensors in their places."""
    kept: dict[str, Any] = {"window": layer.window, "rope": layer.rope}
    kept |= {"qkv": [named(w) for w in layer.qkv], "out": named(layer.out)}
    if layer.router is None:
        kept["mlps"] = [[named(w) for w in (*mlp.gate_up, mlp.down)] for mlp in layer.mlps]
    else:
        router, *parts = (f"model.layers.{index}.{name}.weight" for name in _EXPERTS[model_type])
        kept["router"] = [named(layer.router.weight, router), layer.router.chosen, layer.router.normalized]
        kept["mlps"] = [
            [named(w, name.format(e)) for w, name in zip((*mlp.gate_up, mlp.down), parts, strict=True)]
            for e, mlp in enumerate(layer.mlps)
        ]
    return kept | {field: [named(v) for v in getattr(layer, field)] for field in _VECTORS}


def _names_of(index: int, seen: list[dict[str, Any]], config: Any, checkpoint: _Checkpoint) -> dict[str, Any]:
    """Return what `_names` would of any layer, seen or not. Raises KeyError if the files have it not, or otherwise."""
    if index < len(seen):
        return seen[index]
    kinds = kinds_of_layers(config)
    alike = next(i for i in range(len(seen)) if kinds[i] == kinds[index])
    kept: dict[str, Any] = json.loads(json.dumps(seen[alike]).replace(f".layers.{alike}.", f".layers.{index}."))
    for name, like in zip(_all_names(kept), _all_names(seen[alike]), strict=True):
        if checkpoint.kind(name) != checkpoint.kind(like):
            raise KeyError(name)
    return kept


def _all_names(document: Any) -> list[str]:
    """Return every name of a tensor in a document, or in a part of it, once, in order."""
    if isinstance(document, dict):
        document = list(document.values())
    if isinstance(document, list):
        return list(dict.fromkeys(name for part in document for name in _all_names(part)))
    return [document] if isinstance(document, str) else []


def read(path: Path, directory: Directory) -> Recipe | None:
    """Return the recipe at `path`; None when there is none, or it cannot be followed."""
    try:
        with safe_open(path, "pt") as file:
            document = json.loads(file.metadata()["recipe"])
            frequencies = [file.get_tensor(f"rope.{i}") for i in range(len(document["ropes"]))]
        checkpoint = _Checkpoint(directory)
        embedding = checkpoint[document["embedding"]]
        separate = document["head"] is not None
        description = Description(
            **{name: document[name] for name in _NUMBERS},
            ropes=tuple(Rope(*rope) for rope in zip(frequencies, document["ropes"], strict=True)),
            layers=tuple(_layer(kept, checkpoint) for kept in document["layers"]),
            final_norm=checkpoint[document["final_norm"]],
            head=checkpoint[document["head"]] if separate else embedding,
            embedding=embedding if separate else None,
        )
        return Recipe(description, document["architecture"], document["num_parameters"])
    except (OSError, KeyError, TypeError, ValueError, SafetensorError):
        return None


def _layer(kept: dict[str, Any], checkpoint: _Checkpoint) -> Layer:
    def vectors_of(field: str) -> tuple[torch.Tensor | None, ...]:
        return tuple(None if name is None else checkpoint[name] for name in kept[field])

    router = kept.get("router")
    values: dict[str, Any] = {
        "qkv": tuple(checkpoint[name] for name in kept["qkv"]),
        "out": checkpoint[kept["out"]],
        "mlps": tuple(Mlp((checkpoint[gate], checkpoint[up]), checkpoint[down]) for gate, up, down in kept["mlps"]),
        "router": None if router is None else Router(checkpoint[router[0]], *router[1:]),
        **{field: vectors_of(field) for field in _VECTORS},
        "window": kept["window"],
        "rope": kept["rope"],
    }
    return Layer(**{field.name: values[field.name] for field in fields(Layer)})


class _Checkpoint:
    """Every tensor of a model's files by its name. Each is mapped; its pages are read when it is used."""

    def __init__(self, directory: Directory) -> None:
        self._files: dict[str, Any] = {}
        for path in directory.weight_files:
            # Not closed: what is read from it stays mapped all the same, and goes with the last tensor.
            file = safe_open(path, "pt")
            self._files |= dict.fromkeys(file.keys(), file)  # type: ignore[no-untyped-call]

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def kind(self, name: str) -> tuple[list[int], str]:
        """Return a tensor's shape and type; reads nothing of it."""
        part = self._files[name].get_slice(name)
        return part.get_shape(), part.get_dtype()


def _first_stored(names: dict[int, str], checkpoint: _Checkpoint, weight: torch.Tensor, model: Any) -> str:
    """The checkpoint's name of an embedding that the head may share."""
    candidates = [
        name for name, p in model.named_parameters(remove_duplicate=False) if p.data_ptr() == weight.data_ptr()
    ]
    for name in candidates:
        if name in checkpoint and torch.equal(checkpoint[name].to(weight.dtype), weight):
            return str(name)
    raise KeyError(names[weight.data_ptr()])
