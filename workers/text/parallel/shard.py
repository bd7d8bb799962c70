"""One rank's share of a model: loaded by transformers from its own slices of the files, then made plain again.

Above: `opening.py` (rank 0) and `follower.py`. Below: transformers' tensor parallelism, `loader.py`, `eager.py`.

transformers cuts parameters into DTensors and wraps the forward of each cut layer. That costs host time at every layer
of every step, so linear layers, of which there are most, become plain modules over plain tensors here: a layer cut by
its outputs is an ordinary `nn.Linear`, or a `GatheredLinear` where the next one needs all of it; one cut by its inputs
is a `SummedLinear`. They can then be packed or quantized like any other. Embedding and experts stay as transformers
made them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from workers.engine import LoadSpec
from workers.text import linear
from workers.text.attention import PagedCache
from workers.text.directory import Directory, LoadedModel, kv_shape, num_kv_heads, read_directory
from workers.text.eager import ModelRunner
from workers.text.loader import Report, load
from workers.text.parallel.group import Membership, joined_environment, limit_waiting
from workers.text.parallel.plan import CannotSplit, SplitPlan, plan_split
from workers.text.threads import Threads

# transformers' rules for linear layers: cut by outputs, and whether those are gathered; by inputs, and whether those
# come whole. Parts are as of `torch.chunk`.
_BY_OUTPUTS = {"colwise": False, "colwise_gather_output": True, "colwise_rep": True}
_BY_INPUTS = {"rowwise": False, "rowwise_split_input": True, "rowwise_rep": True}
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


class SummedLinear(nn.Module):
    """A linear layer cut by its inputs; output (…, out), summed over all ranks. All must call it at the same point.

    Args:
        part: this rank's columns, without bias.
        columns: which those are, when the input is whole (…, in); None when it is this rank's part already.
    """

    def __init__(self, part: nn.Linear, bias: torch.Tensor | None, columns: slice | None) -> None:
        super().__init__()
        self.part: nn.Module = part
        self._bias, self._columns = bias, columns

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the whole layer's output, the same on every rank."""
        output: torch.Tensor = self.part(hidden if self._columns is None else hidden[..., self._columns])
        dist.all_reduce(output)
        return output if self._bias is None else output + self._bias


class GatheredLinear(nn.Module):
    """A linear layer cut by its outputs; output (…, out), put together on all ranks, which must all call it together.

    Args:
        part: this rank's rows; the last ranks may have fewer.
        num_outputs: of the whole layer.
        most: rows of the first rank's part.
    """

    def __init__(self, part: nn.Linear, num_outputs: int, most: int) -> None:
        super().__init__()
        self.part: nn.Module = part
        self._num_outputs, self._most = num_outputs, most

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the whole layer's output, the same on every rank."""
        own: torch.Tensor = self.part(hidden)
        own = nn.functional.pad(own, (0, self._most - own.shape[-1])).contiguous()
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        return torch.cat(parts, dim=-1)[..., : self._num_outputs]


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank has.

    Attributes:
        loaded: the model, whose modules are this rank's part; facts and cache size are of the whole.
        runner: its runner, with its part of the cache.
        weight_bytes: of this rank's part.
    """

    loaded: LoadedModel
    runner: ModelRunner
    weight_bytes: int


def prepare(spec: LoadSpec) -> tuple[Directory, SplitPlan]:
    """Return what `spec.path` says of the model but for its weights, and how it is cut over `spec.devices`.

    Every rank comes to the same result. The cache size is that of all ranks together. Blocking: a second.

    Raises:
        ModelLoadFailed: the directory or the architecture cannot be served.
        CannotSplit: it can, but not on several devices by tensor parallelism.
    """
    directory = read_directory(spec)
    text, num_parts = directory.text, len(spec.devices)
    if directory.config is not text:
        raise CannotSplit("it takes images")
    if type(directory.config) not in AutoModelForCausalLM._model_mapping:
        raise CannotSplit("its code is not transformers' own")
    kv_heads = num_kv_heads(text)
    plan = plan_split(directory.config.base_model_tp_plan, int(text.num_attention_heads), kv_heads, num_parts)
    if plan.num_kv_heads * num_parts != kv_heads:
        kv = kv_shape(spec, text, directory.dtype, plan.num_kv_heads * num_parts)
        directory = replace(directory, kv=kv)
    return directory, plan


def load_share(
    spec: LoadSpec, directory: Directory, plan: SplitPlan, member: Membership, num_threads: int, report: Report
) -> Share:
    """Load this rank's part of what `prepare` found; the group must be joined. Blocking: seconds.

    Raises:
        ModelLoadFailed: as `loader.load`.
    """
    architecture: Any = AutoModelForCausalLM._model_mapping[type(directory.config)]
    prefix = architecture.base_model_prefix
    overrides = {f"{prefix}.{name}": rule for name, rule in plan.overrides.items()}
    config = DistributedConfig(tp_size=member.size, tp_plan=overrides or None)
    with joined_environment(member):
        loaded = load(spec, report, directory, split={"distributed_config": config})
    limit_waiting(loaded.model._device_mesh.get_group("tp"))
    flatten(loaded.model)
    if spec.quantize:
        linear.quantize(loaded.decoder, spec.quantize)
    else:
        linear.pack(loaded.model)
    cache = PagedCache(
        replace(directory.kv, num_kv_heads=plan.num_kv_heads),
        directory.dtype,
        member.device,
        kept_heads=plan.kept_heads(member.rank, num_kv_heads(directory.text)),
    )
    runner = ModelRunner(loaded.model, cache, Threads(num_threads, num_threads))
    return Share(loaded, runner, part_bytes(loaded.model))


def flatten(model: Any) -> int:
    """Make the cut linear layers of a model plain, in place; return how many there were."""
    linears = [
        (parent, f"{path}.{name}" if path else name, name, child)
        for path, parent in model.named_modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    num_flat = 0
    for parent, path, name, child in linears:
        rule = model.tp_plan.get(_NUMBER.sub(".*", path), "")
        if rule not in _BY_OUTPUTS and rule not in _BY_INPUTS:
            continue
        num_outputs, num_inputs = child.weight.shape
        bias = None if child.bias is None else _own(child.bias)
        del child.forward  # transformers' wrapper, set on the instance; the class's own is below it
        child.weight = nn.Parameter(_own(child.weight), requires_grad=False)
        kept = None if bias is None or rule in _BY_INPUTS else nn.Parameter(bias, requires_grad=False)
        child.register_parameter("bias", kept)
        child.out_features, child.in_features = child.weight.shape
        size = dist.get_world_size()
        if rule in _BY_INPUTS:
            most = -(-num_inputs // size)
            first = dist.get_rank() * most
            setattr(parent, name, SummedLinear(child, bias, slice(first, first + most) if _BY_INPUTS[rule] else None))
        elif _BY_OUTPUTS[rule]:
            setattr(parent, name, GatheredLinear(child, num_outputs, -(-num_outputs // size)))
        num_flat += 1
    return num_flat


def part_bytes(model: Any) -> int:
    """Return the bytes of this rank's parameters and of what quantized or packed layers keep instead.

    What embedding and head share counts once.
    """
    tensors = [_own(tensor) for tensor in (*model.parameters(), *model.buffers())]
    packed = sum(m.num_bytes for m in model.modules() if isinstance(m, linear.PackedLinear))
    return packed + sum({tensor.data_ptr(): int(tensor.nbytes) for tensor in tensors}.values())


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()
