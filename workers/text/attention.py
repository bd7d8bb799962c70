"""Our attention function behind transformers' attention interface, over a paged cache.

Every model definition of transformers calls one function with this step's queries, keys and values. Ours writes the new
keys and values to their blocks, then attends: a step's tokens come packed in one row (`packing.py`), so that linear
layers run once for everybody. How is the step's own business. `StepContext` gathers what its works attend to, for all
works of one row at once, for every longer one by itself; `gpu/layout.py` reads it where it lies.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from transformers import AttentionInterface

from workers.text.kv_cache import BLOCK_TOKENS, KVShape
from workers.text.packing import PackedStep

NAME = "hostler"


class PagedCache:
    """Keys and values of every block: for each layer (blocks * BLOCK_TOKENS, kv_heads, head_dim).

    On the CPU the tensors are reserved address space: memory is committed only where tokens were written. Each layer
    has tensors of its own, so that a resize needs room for one layer's beside the cache, not for the cache twice.

    Args:
        kept_heads: which of the heads that the model computes are kept: all, but for some split models.
        layer_devices: of each layer, when not all are on `device`.
    """

    def __init__(
        self,
        shape: KVShape,
        dtype: torch.dtype,
        device: torch.device,
        kept_heads: slice = slice(None),
        layer_devices: Sequence[torch.device] = (),
    ) -> None:
        self.device = device
        self.num_kv_heads = shape.num_kv_heads
        self.dtype = dtype
        self.kept_heads = kept_heads
        self._row = (shape.num_kv_heads, shape.head_dim)
        self._devices = tuple(layer_devices) or (device,) * shape.num_layers
        self._keys = [self._empty(shape.num_blocks, there) for there in self._devices]
        self._values = [self._empty(shape.num_blocks, there) for there in self._devices]

    def _empty(self, num_blocks: int, device: torch.device) -> torch.Tensor:
        return torch.empty((num_blocks * BLOCK_TOKENS, *self._row), dtype=self.dtype, device=device)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of one layer, each (positions, kv_heads, head_dim)."""
        return self._keys[index], self._values[index]

    def drop(self) -> None:
        """Let go of all keys and values; the cache is of no further use."""
        self._keys, self._values = [], []

    def resize(self, num_blocks: int, kept: Mapping[int, int]) -> None:
        """Have so many blocks; the contents of kept ones (old index, new index) stay.

        Raises:
            torch.OutOfMemoryError, MemoryError: no room to grow; blocks that were there stay usable.
        """
        offsets = torch.arange(BLOCK_TOKENS)

        def places(blocks: Collection[int]) -> torch.Tensor:
            first = torch.tensor(list(blocks), dtype=torch.long) * BLOCK_TOKENS
            return (first[:, None] + offsets).reshape(-1)

        everywhere = {
            there: (places(kept.keys()).to(there), places(kept.values()).to(there)) for there in self._devices
        }
        for tensors in (self._keys, self._values):
            for index, there in enumerate(self._devices):
                old, new = everywhere[there]
                contents = tensors[index][old]
                if num_blocks * BLOCK_TOKENS < tensors[index].shape[0]:
                    tensors[index] = torch.empty(0)  # First let go: there may be no room for both.
                    if there.type == "cuda":  # Else the new one is cut from the old one's segment, all of which stays.
                        torch.cuda.empty_cache()
                resized = self._empty(num_blocks, there)
                resized[new] = contents
                tensors[index] = resized
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows `row … row + length` of the step are positions `start … start + length` of one sequence.

    Attributes:
        places: (start + length,) int64: where each of its positions lies in the cache.
    """

    row: int
    length: int
    start: int
    places: torch.Tensor


class Attending(Protocol):
    """A step, as attention sees it."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Keep the rows' keys and values; return (rows, heads, head_dim): what each makes of its sequence up to itself.

        Args:
            layer: its index.
            query: (heads, rows, head_dim); `key` and `value` (kv_heads, rows, head_dim), rotated.
            window: how many positions a row sees, itself included; None: all.
            softcap: logits are squashed to ± this; None: they are not.
        """


@dataclass(slots=True)
class StepContext:
    """What attention must know of a step that gathers.

    Attributes:
        cache: where keys and values live.
        new_places: (rows,) int64: where each row's key and value go.
        single_places: (singles, longest) int64: where each single row's sequence lies; padded.
        single_positions: (singles,) int64.
        chunks: works of several rows, in row order.
        masks: filled by the first layer, read by the rest.
        elsewhere: copies for the devices of other layers.
    """

    cache: PagedCache
    new_places: torch.Tensor
    single_places: torch.Tensor
    single_positions: torch.Tensor
    chunks: tuple[Chunk, ...]
    masks: dict[tuple[int, int | None], torch.Tensor | None] = field(default_factory=dict)
    elsewhere: dict[torch.device, StepContext] = field(default_factory=dict)

    @classmethod
    def of(cls, packed: PackedStep, cache: PagedCache) -> StepContext:
        """Lay a packed step out over the cache's blocks."""
        offsets = np.arange(BLOCK_TOKENS)
        places = (packed.tables[:, :, None].astype(np.int64) * BLOCK_TOKENS + offsets).reshape(len(packed.tables), -1)
        owner = np.repeat(np.arange(len(packed.sequences)), packed.sequences[:, 1])

        def there(array: np.ndarray[Any, Any]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, np.int64)).to(cache.device)

        n = packed.num_singles
        longest = int(packed.positions[:n].max()) + 1 if n else 0
        chunks = tuple(
            Chunk(int(row), int(rows), int(start), there(places[table, : start + rows]))
            for row, rows, start, table in packed.sequences[n:]
        )
        return cls(
            cache=cache,
            new_places=there(places[owner, packed.positions]),
            single_places=there(places[:n, :longest]),
            single_positions=there(packed.positions[:n]),
            chunks=chunks,
        )

    def on(self, device: torch.device) -> StepContext:
        """Return the same on a layer's device: itself, or a copy that is made once a step."""
        if device == self.new_places.device:
            return self
        if device not in self.elsewhere:
            self.elsewhere[device] = StepContext(
                cache=self.cache,
                new_places=self.new_places.to(device),
                single_places=self.single_places.to(device),
                single_positions=self.single_positions.to(device),
                chunks=tuple(replace(chunk, places=chunk.places.to(device)) for chunk in self.chunks),
            )
        return self.elsewhere[device]

    def single_mask(self, window: int | None) -> torch.Tensor | None:
        """Boolean mask (singles, 1, 1, longest): each row sees its own sequence; None when all see all."""
        key = (-1, window)
        if key not in self.masks:
            columns = torch.arange(self.single_places.shape[1], device=self.single_places.device)
            last = self.single_positions[:, None]
            visible = columns <= last
            if window is not None:
                visible &= columns > last - window
            self.masks[key] = None if bool(visible.all()) else visible[:, None, None, :]
        return self.masks[key]

    def chunk_mask(self, chunk: Chunk, window: int | None) -> torch.Tensor:
        """Boolean mask (1, 1, chunk, start + chunk): causal, perhaps windowed; cached for all layers."""
        key = (chunk.row, window)
        if key not in self.masks:
            device = chunk.places.device
            rows = torch.arange(chunk.start, chunk.start + chunk.length, device=device)[:, None]
            columns = torch.arange(chunk.start + chunk.length, device=device)[None, :]
            visible = columns <= rows
            if window is not None:
                visible &= columns > rows - window
            self.masks[key] = visible[None, None]
        mask = self.masks[key]
        assert mask is not None
        return mask

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """See `Attending.attend`."""
        here = self.on(query.device)
        keys, values = self.cache.layer(layer)
        keys[here.new_places] = key[self.cache.kept_heads].transpose(0, 1)
        values[here.new_places] = value[self.cache.kept_heads].transpose(0, 1)
        heads, rows, head_dim = query.shape
        kv_heads = keys.shape[1]
        group = heads // kv_heads
        output = query.new_empty((rows, heads, head_dim))

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            if softcap is not None:
                return _softcapped(q, k, v, mask, scale, softcap)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

        if n := here.single_positions.shape[0]:
            # A key head's group of query heads stands where query positions do: no key is ever repeated.
            q = query[:, :n].transpose(0, 1).reshape(n, kv_heads, group, head_dim)
            k, v = keys[here.single_places].transpose(1, 2), values[here.single_places].transpose(1, 2)
            mask = here.single_mask(window)
            if mask is not None:
                # Padding may be anything an earlier owner left, even NaN, which a mask alone does not silence in a sum.
                padding = ~mask.transpose(2, 3)
                k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
            output[:n] = run(q, k, v, mask).reshape(n, heads, head_dim)
        for chunk in here.chunks:
            own = slice(chunk.row, chunk.row + chunk.length)
            q = query[None, :, own]
            k = keys[chunk.places].transpose(0, 1).repeat_interleave(group, dim=0)[None]
            v = values[chunk.places].transpose(0, 1).repeat_interleave(group, dim=0)[None]
            if chunk.start == 0 and window is None and softcap is None:
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
            else:
                attended = run(q, k, v, here.chunk_mask(chunk, window))
            output[own] = attended[0].transpose(0, 1)
        return output


def _softcapped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float, cap: float
) -> torch.Tensor:
    """Attention with logits squashed to ±cap (Gemma 2), which torch's fused kernels do not have."""
    logits = torch.matmul(query, key.transpose(-1, -2)) * scale
    logits = cap * torch.tanh(logits / cap)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return torch.matmul(torch.softmax(logits, dim=-1, dtype=torch.float32).to(value.dtype), value)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    step: Attending | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over the cache; the signature is transformers' attention interface.

    Args:
        module: the layer; its `layer_idx` finds its cache.
        query: (1, heads, rows, head_dim); `key` and `value` (1, kv_heads, rows, head_dim), rotated.
        attention_mask: None always: masks come from `step`.
        step: this step's layout, passed through the model's keyword arguments.

    Returns:
        (1, rows, heads, head_dim) and None. Mutates the cache.
    """
    if step is None:
        raise RuntimeError("the model definition did not pass our step through to its attention layers")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    return step.attend(layer, query[0], key[0], value[0], scale=scale, window=sliding_window, softcap=softcap)[
        None
    ], None


AttentionInterface.register(NAME, attend)
