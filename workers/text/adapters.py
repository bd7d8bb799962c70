"""LoRA adapters beside a model: peft's two files read and checked against the base, and added in transformers' layers.

Above: `loader.py` and `opening.py` read, runners add. Below: safetensors, torch. An adapted layer gives
`W x + scale * up (down x)` for the rows of sequences that ask for the adapter, and `W x` for all others in the same
step. Here for transformers' modules; `native/lora.h` does the same in the kernels. Whatever an adapter has beyond that
is refused by name: it would answer otherwise than in training.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostler.errors import ModelLoadFailed
from safetensors import SafetensorError, safe_open
from torch import nn

from workers.engine import AdapterSource
from workers.text.packing import PackedStep

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_RANK = 512

_MAX_CONFIG_BYTES = 10**6
_LAYER = re.compile(r"layers\.(\d+)\.((?:self_attn|mlp)\.\w+)")
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Any other setting that is switched on changes what is computed, or may do so in some later version of peft.
_KNOWN = {
    "peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights", "base_model_name_or_path", "revision",
    "task_type", "inference_mode", "auto_mapping", "peft_version", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "lora_dropout", "megatron_config", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
# Others take something off the base model's weights, which nobody does here.
_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(slots=True, eq=False)
class Delta:
    """What an adapter adds to one linear layer.

    Attributes:
        down: (rank, inputs), peft's lora_A.
        up: (outputs, rank), peft's lora_B.
        scale: factor of their product.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Width between the two."""
        return int(self.down.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One adapter: its public name and its deltas by (layer, linear layer within it, such as "self_attn.q_proj")."""

    name: str
    deltas: Mapping[tuple[int, str], Delta]

    def release(self) -> None:
        """Free the tensors; for when a runner has a copy of its own and no other runner will want one."""
        for delta in self.deltas.values():
            delta.down = delta.up = torch.empty(0)


@dataclass(frozen=True, slots=True)
class AdaptedLayer:
    """A linear layer that an adapter may add to: its decoder layer, its name there, and the shape of its weight."""

    layer: int
    name: str
    outputs: int
    inputs: int


def linear_layers(model: Any) -> dict[str, AdaptedLayer]:
    """Return the linear layers of a transformers model's text decoder, by their path in the whole model.

    Args:
        model: with `get_decoder`, its layers still `nn.Linear`.
    """
    decoder = model.get_decoder()
    prefix = next(path for path, module in model.named_modules() if module is decoder)
    found: dict[str, AdaptedLayer] = {}
    for path, module in decoder.named_modules(prefix=prefix):
        match = _LAYER.fullmatch(path.removeprefix(f"{prefix}."))
        if match is not None and isinstance(module, nn.Linear):
            found[path] = AdaptedLayer(int(match[1]), match[2], module.out_features, module.in_features)
    return found


def read_adapters(sources: Sequence[AdapterSource], layers: Mapping[str, AdaptedLayer]) -> tuple[Adapter, ...]:
    """Read what peft saved of each; see `read_adapter`."""
    return tuple(read_adapter(source.name, Path(source.path), layers) for source in sources)


def read_adapter(name: str, directory: Path, layers: Mapping[str, AdaptedLayer]) -> Adapter:
    """Read what peft saved and check it against the model that it shall run beside. Blocking.

    Args:
        name: public name, for messages too.
        directory: with adapter_config.json and adapter_model.safetensors.
        layers: what may be adapted, by its path in the whole model.

    Raises:
        ModelLoadFailed: missing, damaged, not for this model, or more than LoRA on linear layers; says which.
    """
    try:
        scale, rank = _scale(_read_config(directory / CONFIG))
        return Adapter(name, _read_deltas(directory / WEIGHTS, rank, scale, layers))
    except _Refused as reason:
        raise ModelLoadFailed(f"Adapter {name}: {reason}.") from reason


class _Refused(Exception):
    """Why an adapter cannot be served, as the end of a sentence without its full stop."""


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise _Refused(f"{CONFIG} is too large")
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _Refused(f"{CONFIG} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _Refused(f"{CONFIG} is not valid JSON") from error
    if not isinstance(config, dict):
        raise _Refused(f"{CONFIG} is not a JSON object")
    return config


def _scale(config: dict[str, Any]) -> tuple[float, int]:
    """Return the factor of the deltas and their rank, or refuse what is more than plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise _Refused(f"it is of type {str(config.get('peft_type'))[:40]!r}, and only LORA is served")
    if config.get("bias", "none") != "none":
        raise _Refused("it changes biases (bias), which is not served")
    if config.get("init_lora_weights") not in _INITIAL:
        how = str(config["init_lora_weights"])[:40]
        raise _Refused(f"it was begun with {how!r}, which changes the base model; convert it to plain LoRA with peft")
    switched_on = [
        key
        for key, value in config.items()
        if key not in _KNOWN and (value is True or (isinstance(value, str | list | dict) and value))
    ]
    if switched_on:
        raise _Refused(f"it uses {', '.join(sorted(switched_on))[:200]}, which is not served")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
        raise _Refused(f"its rank r is {str(rank)[:40]}, and must be 1 to {MAX_RANK}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise _Refused(f"its lora_alpha is {str(alpha)[:40]}, which is no number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank), rank


def _read_deltas(
    path: Path, rank: int, scale: float, layers: Mapping[str, AdaptedLayer]
) -> dict[tuple[int, str], Delta]:
    sides: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (not a mapping)
                match = _KEY.fullmatch(key)
                if match is None:
                    raise _Refused(f"its tensor {key[:200]!r} is no part of a linear layer's LoRA")
                sides.setdefault(match[1], {})[match[2]] = file.get_tensor(key)
    except OSError as error:
        raise _Refused(f"{WEIGHTS} cannot be read: {error.strerror or 'no such file'}") from error
    except SafetensorError as error:
        raise _Refused(f"{WEIGHTS} is damaged or cut short") from error
    if not sides:
        raise _Refused(f"{WEIGHTS} is empty")
    deltas: dict[tuple[int, str], Delta] = {}
    for layer_path, pair in sides.items():
        adapted = layers.get(layer_path)
        if adapted is None:
            raise _Refused(f"it adapts {layer_path[:200]!r}, which is no linear layer of this model's text decoder")
        shapes = {"A": (rank, adapted.inputs), "B": (adapted.outputs, rank)}
        for side, shape in shapes.items():
            tensor = pair.get(side)
            if tensor is None or tuple(tensor.shape) != shape or tensor.dtype not in _DTYPES:
                had = "is missing" if tensor is None else f"is {tensor.dtype} {tuple(tensor.shape)}"
                raise _Refused(f"lora_{side} of {layer_path} {had}, and this model needs {shape}")
        deltas[adapted.layer, adapted.name] = Delta(pair["A"], pair["B"], scale)
    return deltas


class _StepRows(threading.local):
    """What the thread's current step adds: the number of its rows, and each adapter's own, (n,) int64."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.of: dict[int, torch.Tensor] = {}


class EagerAdapters:
    """Adds adapters inside a transformers decoder, by hooks behind its linear layers, whatever those have become.

    Layers stay what they are, so whoever looks at the decoder sees the base. Which rows of a step want which adapter is
    known to the thread that runs the step alone: another may run the same modules meanwhile.

    Args:
        adapters: in the order that `PackedStep.adapters` counts; their tensors are copied.
        decoder: the module with `layers`.
        device, dtype: of its activations.
    """

    def __init__(
        self, adapters: tuple[Adapter, ...], decoder: nn.Module, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._device = device
        self._step = _StepRows()
        by_layer: dict[tuple[int, str], dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}
        for index, adapter in enumerate(adapters):
            for place, delta in adapter.deltas.items():
                down = delta.down.to(device, dtype, copy=True)
                up = (delta.up.float() * delta.scale).to(device, dtype)
                by_layer.setdefault(place, {})[index] = (down, up)
        self._weights = list(by_layer.values())
        self._hooks = [
            decoder.get_submodule(f"layers.{layer}.{name}").register_forward_hook(self._adding(weights))
            for (layer, name), weights in by_layer.items()
        ]

    @contextmanager
    def added(self, packed: PackedStep) -> Iterator[None]:
        """Within it, this thread's forward passes over `packed` have its sequences' adapters."""
        if packed.adapters is None:
            yield
            return
        owner = np.repeat(packed.adapters, packed.sequences[:, 1])
        self._step.num_rows = owner.size
        self._step.of = {
            int(index): torch.from_numpy(np.flatnonzero(owner == index)).to(self._device)
            for index in np.unique(owner)
            if index >= 0
        }
        try:
            yield
        finally:
            self._step.of = {}

    def move_to(self, device: torch.device) -> None:
        """Bring the adapters' tensors to another device."""
        self._device = device
        for weights in self._weights:
            weights |= {index: (down.to(device), up.to(device)) for index, (down, up) in weights.items()}

    def close(self) -> None:
        """Leave the decoder as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _adding(self, weights: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., None]:
        step = self._step

        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            for index, rows in step.of.items():
                if index not in weights:
                    continue
                down, up = weights[index]
                hidden = inputs[0].reshape(-1, down.shape[1])
                assert hidden.shape[0] == step.num_rows, "a layer that does not see all rows in their order"
                delta = hidden.index_select(0, rows) @ down.T @ up.T
                output.view(-1, up.shape[0]).index_add_(0, rows, delta)

        return add
