"""One model in one process, its layers over several GPUs: for architectures that tensor parallelism cannot cut.

Above: `opening.py`. Below: accelerate's hooks, which carry the hidden states from one device to the next; our cache,
which has each layer's keys and values where the layer is. Embedding, norm and head stay on the first device, so that
what goes in and what comes out are in one place. One device works at a time: this buys room, not speed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from hostler.errors import ModelLoadFailed
from transformers import AutoModelForCausalLM

from workers.engine import LoadSpec
from workers.text import linear, vision
from workers.text.attention import PagedCache
from workers.text.directory import Directory, LoadedModel, read_directory
from workers.text.eager import ModelRunner
from workers.text.kv_cache import BLOCK_TOKENS
from workers.text.loader import Report, load
from workers.text.scheduler import Step
from workers.text.threads import Threads


class LayersRunner:
    """Transformers' definition with its layers on several devices. It cannot be moved: it sleeps by being closed."""

    name = "layers over devices"

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.runs_ahead = runner.runs_ahead

    def run(self, step: Step) -> torch.Tensor:
        """Run one step; see `workers.text.runner.Runner.run`."""
        return self._runner.run(step)

    def resize(self, num_blocks: int, kept: Mapping[int, int]) -> None:
        """Have a cache of so many blocks; see `workers.text.runner.Runner.resize`."""
        self._runner.resize(num_blocks, kept)

    def seconds(self) -> dict[str, float]:
        """Return nothing, as the runner inside."""
        return self._runner.seconds()

    def close(self) -> None:
        """Let go of the model and the cache."""
        self._runner.close()


def spread(layer_bytes: Sequence[int], other_bytes: int, num_devices: int) -> list[int]:
    """Return the device of each layer, so that all devices hold about as much and neighbours stay together.

    Args:
        layer_bytes: of each layer, its keys and values included.
        other_bytes: of what stays on the first device beside its layers.
    """
    total = other_bytes + sum(layer_bytes)
    middles = [end - own / 2 for end, own in zip(accumulate(layer_bytes), layer_bytes, strict=True)]
    return [min(num_devices - 1, int((other_bytes + middle) * num_devices / total)) for middle in middles]


def open_layers(spec: LoadSpec, report: Report) -> tuple[LoadedModel, LayersRunner]:
    """Return the model over `spec.devices` and its runner. Blocking: seconds.

    Raises:
        ModelLoadFailed: it cannot be loaded, or takes images.
    """
    directory = read_directory(spec)
    if vision.is_image_text(directory.config):
        raise ModelLoadFailed(f"{spec.model} takes images; such models are not served over several devices.")
    devices = [torch.device(name) for name in spec.devices]
    names, of_layers = place(directory, spec, len(devices))
    split = {"device_map": {name: devices[index] for name, index in names.items()}}
    loaded = load(spec, report, directory, split=split)
    if spec.quantize:
        saved = linear.quantize(loaded.decoder, spec.quantize)
        loaded = loaded.told(spec.quantize, loaded.facts.weight_bytes - saved)
    layer_devices = [devices[index] for index in of_layers]
    cache = PagedCache(directory.kv, directory.dtype, devices[0], layer_devices=layer_devices)
    return loaded, LayersRunner(ModelRunner(loaded.model, cache, Threads(1, 1)))


def place(directory: Directory, spec: LoadSpec, num_devices: int) -> tuple[dict[str, int], list[int]]:
    """Return the device of each module of the model, as accelerate names them, and that of each layer.

    Raises:
        ModelLoadFailed: its layers are not where other models have them.
    """
    with torch.device("meta"):
        build: Any = AutoModelForCausalLM.from_config
        model = build(directory.config, trust_remote_code=spec.trust_remote_code)
    decoder = model.get_decoder()
    path = next(name for name, module in model.named_modules() if module is decoder)
    found = [name for name, module in decoder.named_children() if isinstance(module, torch.nn.ModuleList)]
    if len(found) != 1:
        raise ModelLoadFailed(f"{spec.model} cannot be laid over several devices: it is not one stack of layers.")
    layers = getattr(decoder, found[0])
    kv = directory.kv
    kv_bytes = kv.num_blocks * BLOCK_TOKENS * kv.bytes_per_token(directory.dtype.itemsize) // kv.num_layers
    total = sum(p.numel() for p in model.parameters()) * directory.dtype.itemsize
    own = [sum(p.numel() for p in layer.parameters()) * directory.dtype.itemsize for layer in layers]
    of_layers = spread([weights + kv_bytes for weights in own], total - sum(own), num_devices)
    prefix = f"{path}." if path else ""
    names = {name: 0 for name, child in model.named_children() if child is not decoder}
    names |= {f"{prefix}{name}": 0 for name, _ in decoder.named_children() if name != found[0]}
    names |= {f"{prefix}{found[0]}.{index}": device for index, device in enumerate(of_layers)}
    return names, of_layers
