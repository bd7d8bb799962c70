"""Runs a step through transformers' own model definition, on any device; and opens that runner.

Above: the engine's loop, `opening.py`. Below: the model, which calls `attention.attend` for each layer with our
context.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from workers.engine import LoadSpec
from workers.text import linear, threads
from workers.text.adapters import EagerAdapters
from workers.text.attention import Attending, PagedCache, StepContext
from workers.text.directory import LoadedModel, choose_dtype
from workers.text.embeddings import overlaps, overlay
from workers.text.kv_cache import KVShape, blocks_for
from workers.text.native.runner import PROBE_TOKENS, NativeRunner, agree, probe
from workers.text.packing import PackedStep, pack
from workers.text.scheduler import Step, Work
from workers.text.shelf import Shelf
from workers.text.threads import Threads

log = logging.getLogger(__name__)

Placed = tuple[tuple[int, Work], ...]


class ModelRunner:
    """Transformers' definition with our attention over a paged cache, on any device."""

    name = "eager"

    def __init__(self, model: Any, cache: PagedCache, threads: Threads, adapters: EagerAdapters | None = None) -> None:
        self._model = model
        self._cache = cache
        self._threads = threads
        self._adapters = adapters
        self._shelf: Shelf | None = None
        self.runs_ahead = cache.device.type == "cuda"

    def run(self, step: Step) -> torch.Tensor:
        """Run one step; see `workers.text.runner.Runner.run`."""
        return self.run_packed(pack(step))

    @torch.inference_mode()
    def run_packed(self, packed: PackedStep) -> torch.Tensor:
        """The same for a packed step."""
        torch.set_num_threads(self._threads.for_rows(packed.tokens.size))
        device = self._cache.device

        def here(array: Any) -> torch.Tensor:
            return torch.from_numpy(array).to(device, torch.long)

        with self._adapters.added(packed) if self._adapters is not None else nullcontext():
            logits = self._forward(
                self._inputs(here(packed.tokens)[None], packed.placed),
                _positions(here(packed.positions)[None], packed.placed),
                self._laid_out(packed),
                here(packed.logit_rows),
            )
        return logits.float()

    def _laid_out(self, packed: PackedStep) -> Attending:
        return StepContext.of(packed, self._cache)

    def _forward(
        self,
        inputs: Mapping[str, torch.Tensor],
        positions: torch.Tensor,
        context: Attending,
        logit_rows: torch.Tensor | int,
    ) -> torch.Tensor:
        """Return logits (rows, vocab) of the rows that are wanted, where the model is; 0: of all."""
        output = self._model(**inputs, position_ids=positions, use_cache=False, logits_to_keep=logit_rows, step=context)
        logits: torch.Tensor = output.logits[0]
        return logits

    def _inputs(self, ids: torch.Tensor, placed: Placed) -> dict[str, torch.Tensor]:
        """Return the ids (1, rows) or, where pictures stand among them, embeddings (1, rows, hidden)."""
        seeing = [(row, w) for row, w in placed if overlaps(w.sequence.embeddings, w.start, w.end)]
        if not seeing:
            return {"input_ids": ids}
        hidden = self._model.get_input_embeddings()(ids)
        for row, work in seeing:
            overlay(hidden[0], row, work.start, work.end, work.sequence.embeddings)
        return {"inputs_embeds": hidden}

    def resize(self, num_blocks: int, kept: Mapping[int, int]) -> None:
        """Have a cache of so many blocks; see `workers.text.runner.Runner.resize`."""
        self._cache.resize(num_blocks, kept)

    def move_to_host(self, facts: object) -> str:
        """Bring the weights to pinned host memory and drop the cache; see `workers.text.runner.Movable`."""
        self._cache.drop()
        self._shelf = Shelf(self._model, facts, shared=self._adapters is None)
        if self._adapters is not None:
            self._adapters.move_to(torch.device("cpu"))
        return self._shelf.path

    def move_to_device(self, kv: KVShape, device: torch.device) -> None:
        """Bring them back, with an empty cache."""
        assert self._shelf is not None, "was not in host memory"
        self._shelf.clear(self._model, device)
        self._shelf = None
        if self._adapters is not None:
            self._adapters.move_to(device)
        self._cache = PagedCache(kv, self._cache.dtype, device)

    def seconds(self) -> dict[str, float]:
        """Return nothing: torch's operators are not taken apart."""
        return {}

    def close(self) -> None:
        """Let go of the model and the cache."""
        if self._adapters is not None:
            self._adapters.close()
        del self._model, self._cache


def _positions(plain: torch.Tensor, placed: Placed) -> torch.Tensor:
    """Return positions (1, rows) or, where a sequence has three-dimensional ones, (3, 1, rows)."""
    if all(work.sequence.rope is None for _, work in placed):
        return plain
    positions = plain.repeat(3, 1)
    for row, work in placed:
        if work.sequence.rope is not None:
            end = work.start + work.num_rows
            positions[:, row : row + work.num_rows] = work.sequence.rope.between(work.start, end)
    return positions[:, None]


def open_eager(loaded: LoadedModel, spec: LoadSpec, *, keep_weights: bool = False) -> ModelRunner:
    """Return a runner over transformers' definition; its layers are laid out anew unless `keep_weights`."""
    if not keep_weights:
        linear.pack(loaded.model)
    if spec.num_threads:
        chosen = threads.Threads(spec.num_threads, spec.num_threads)
    else:
        chosen = threads.measure(loaded.model, loaded.device)
    log.info("threads chosen", extra={"model": spec.model, "decode": chosen.decode, "prefill": chosen.prefill})
    if loaded.device.type == "cuda" and not loaded.adapters:
        try:
            from workers.text.gpu import narrow
            from workers.text.gpu.graphs import open_graphed
        except ImportError as reason:
            log.warning("no Triton: decode steps are not recorded", extra={"reason": str(reason)})
        else:
            narrow.use(loaded.model)
            if graphed := open_graphed(loaded, chosen, spec.max_running):
                return graphed
    adapters = EagerAdapters(loaded.adapters, loaded.decoder, loaded.device, loaded.dtype) if loaded.adapters else None
    return ModelRunner(loaded.model, PagedCache(loaded.kv, loaded.dtype, loaded.device), chosen, adapters)


def proved(runner: NativeRunner, loaded: LoadedModel, weights: str, *, num_layers: int, routed: bool = False) -> bool:
    """Return whether the kernels' logits agree with the module's, both of the first layers alone.

    The module itself stays as it is, whoever runs it meanwhile.

    Args:
        runner: has that many layers.
        weights: how the kernels keep them.
        routed: whether layers choose among experts.
    """
    shape = KVShape(num_layers, loaded.kv.num_kv_heads, loaded.kv.head_dim, blocks_for(PROBE_TOKENS), PROBE_TOKENS)
    every = len(os.sched_getaffinity(0))
    # The reference computes in float32 where torch's bfloat16 would take seconds.
    dtype = choose_dtype("auto", loaded.dtype, loaded.device)
    first = _with_first_layers(loaded.model, loaded.decoder, num_layers)
    if dtype != loaded.dtype:
        first = copy.deepcopy(first).to(dtype)
    reference = ModelRunner(first, PagedCache(shape, dtype, loaded.device), Threads(every, every))
    steps = probe(int(loaded.head.weight.shape[0]))
    got = torch.cat([runner.run_packed(step) for step in steps])
    expected = torch.cat([reference.run_packed(step) for step in steps])
    return agree(got, expected, weights, routed=routed)


def _with_first_layers(model: Any, decoder: Any, num_layers: int) -> Any:
    """Return a module that shares everything with `model`, but whose decoder has its first layers alone."""

    def twin_of(module: Any) -> Any:
        twin = copy.copy(module)
        twin._modules = dict(module._modules)
        return twin

    path = next(name for name, module in model.named_modules() if module is decoder)
    top = twin = twin_of(model)
    for name in path.split("."):
        twin._modules[name] = twin_of(twin._modules[name])
        twin = twin._modules[name]
    twin._modules["layers"] = decoder.layers[:num_layers]
    return top
