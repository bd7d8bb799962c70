"""A step laid out for kernels that read the cache where it lies.

Above: `graphs.py`, which makes it; `fused.py` and transformers' layers, which attend by it. Below:
`paged_attention.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from workers.text.attention import PagedCache
from workers.text.gpu.paged_attention import TILE_QUERIES, attend_singles, attend_tiles, splits_for
from workers.text.kv_cache import BLOCK_TOKENS
from workers.text.packing import PackedStep


@dataclass(frozen=True, slots=True)
class Layout:
    """What attention must know of a step; see `workers.text.attention.Attending`.

    Attributes:
        cache: where keys and values live.
        places: (rows,) int64: where each row's key and value go.
        positions: (rows,) int64, of each in its sequence.
        tables: (sequences, blocks) int32.
        num_singles: leading rows that are the last of their sequence, each that of its row in `tables`.
        splits: into how many parts the sequences of those are cut.
        tiles: (tiles, 4) int32, of all other rows; see `attend_tiles`. None if there are none.
    """

    cache: PagedCache
    places: torch.Tensor
    positions: torch.Tensor
    tables: torch.Tensor
    num_singles: int
    splits: int
    tiles: torch.Tensor | None = None

    @classmethod
    def of(cls, packed: PackedStep, cache: PagedCache) -> Layout:
        """Lay a packed step out over the cache's blocks."""

        def there(array: np.ndarray[Any, Any]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(cache.device)

        tiles = [
            (row + done, min(TILE_QUERIES, rows - done), start + done, table)
            for row, rows, start, table in packed.sequences[packed.num_singles :].tolist()
            for done in range(0, rows, TILE_QUERIES)
        ]
        return cls(
            cache=cache,
            places=there(places_of(packed)),
            positions=there(packed.positions.astype(np.int64)),
            tables=there(packed.tables),
            num_singles=packed.num_singles,
            splits=splits_on(cache, packed.num_singles),
            tiles=there(np.asarray(tiles, np.int32)) if tiles else None,
        )

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
        """See `workers.text.attention.Attending.attend`."""
        keys, values = self.cache.layer(layer)
        keys[self.places] = key.transpose(0, 1)
        values[self.places] = value.transpose(0, 1)
        return self.read(layer, query.transpose(0, 1).contiguous(), scale=scale, window=window, softcap=softcap)

    def read(
        self, layer: int, query: torch.Tensor, *, scale: float, window: int | None, softcap: float | None = None
    ) -> torch.Tensor:
        """Return (rows, heads, head_dim): what each row of `query`, likewise, makes of what the cache holds already."""
        keys, values = self.cache.layer(layer)
        output = torch.empty_like(query)
        if n := self.num_singles:
            attend_singles(
                query[:n], keys, values, self.tables, self.positions, output[:n],
                splits=self.splits, scale=scale, window=window, softcap=softcap,
            )  # fmt: skip
        if self.tiles is not None:
            attend_tiles(
                query, keys, values, self.tables, self.tiles, output, scale=scale, window=window, softcap=softcap
            )
        return output


def places_of(packed: PackedStep) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return (rows,): where in the cache each row's key and value go."""
    owners = np.repeat(packed.sequences[:, 3], packed.sequences[:, 1])
    blocks = packed.tables[owners, packed.positions // BLOCK_TOKENS].astype(np.int64)
    places: np.ndarray[Any, np.dtype[np.int64]] = blocks * BLOCK_TOKENS + packed.positions % BLOCK_TOKENS
    return places


def splits_on(cache: PagedCache, num_singles: int) -> int:
    """Return into how many parts single rows' sequences are cut on the cache's device."""
    num_processors = 1
    if cache.device.type == "cuda":
        num_processors = torch.cuda.get_device_properties(cache.device).multi_processor_count
    return splits_for(max(1, num_singles), cache.num_kv_heads, num_processors)
