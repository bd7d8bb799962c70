"""The GPU's attention over a paged cache against plain softmax, on the CPU by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.workers.triton_checks.place import DEVICE, NARROW, NEAR
from workers.text.gpu.paged_attention import TILE_QUERIES, attend_singles, attend_tiles, splits_for
from workers.text.kv_cache import BLOCK_TOKENS

PLACES = 40 * BLOCK_TOKENS


def reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor, window: int | None,
    softcap: float | None, scale: float,
) -> torch.Tensor:  # fmt: skip
    places = places[-window:] if window else places
    group = query.shape[0] // keys.shape[1]
    key = keys[places].double().repeat_interleave(group, 1)
    value = values[places].double().repeat_interleave(group, 1)
    logits = torch.einsum("hd,phd->hp", query.double(), key) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.einsum("hp,phd->hd", logits.softmax(-1), value)


def cached(
    lengths: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype, draws: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return keys, values, tables, and where each sequence lies; what nobody has written may be anything."""
    keys, values = (torch.randn((PLACES, kv_heads, head_dim), generator=draws).to(dtype) for _ in range(2))
    blocks = torch.randperm(40, generator=draws).tolist()
    tables = torch.zeros((len(lengths), 19), dtype=torch.int32)
    places = []
    for row, length in enumerate(lengths):
        own = [blocks.pop() for _ in range(-(-length // BLOCK_TOKENS))]
        tables[row, : len(own)] = torch.tensor(own)
        places.append(torch.tensor([own[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS for p in range(length)]))
    unwritten = torch.ones(PLACES, dtype=torch.bool).index_fill(0, torch.cat(places), False)
    keys[unwritten], values[unwritten] = float("nan"), float("nan")
    return keys.to(DEVICE), values.to(DEVICE), tables.to(DEVICE), [one.to(DEVICE) for one in places]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "splits", "window", "softcap"),
    [
        (4, 2, 32, 1, None, None),
        (8, 1, 64, 4, None, None),
        (6, 2, 80, 8, None, 20.0),
        (3, 3, 16, 2, 70, None),
        (4, 2, 32, 4, 5, 30.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
def test_it_attends_as_plain_softmax_does(
    heads: int, kv_heads: int, head_dim: int, splits: int, window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    draws = torch.Generator().manual_seed(heads + splits)
    lengths = [1, 16, 17, 130, 300]
    keys, values, tables, places = cached(lengths, kv_heads, head_dim, dtype, draws)
    query = torch.randn((len(lengths), heads, head_dim), generator=draws).to(DEVICE, dtype)
    scale = head_dim**-0.5

    got = torch.full_like(query, float("nan"))
    attend_singles(
        query, keys, values, tables, torch.tensor(lengths, device=DEVICE) - 1, got,
        splits=splits, scale=scale, window=window, softcap=softcap,
    )  # fmt: skip
    for row, own in enumerate(places):
        expected = reference(query[row], keys, values, own, window, softcap, scale)
        torch.testing.assert_close(got[row].double(), expected, atol=NEAR[dtype], rtol=1e-5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window", "softcap"),
    [
        (4, 2, 32, None, None),
        (9, 3, 64, 40, None),
        (6, 2, 80, None, 20.0),
        (3, 3, 16, 5, 30.0),
        (12, 1, 32, None, None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
def test_every_row_of_a_prompt_sees_its_sequence_up_to_itself(
    heads: int, kv_heads: int, head_dim: int, window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    draws = torch.Generator().manual_seed(heads)
    lengths, news = [3, 40, 150, 200], [3, 17, 20, 1]  # the last one's work is not of several rows: nobody asks for it
    keys, values, tables, places = cached(lengths, kv_heads, head_dim, dtype, draws)
    query = torch.randn((sum(news), heads, head_dim), generator=draws).to(DEVICE, dtype)
    tiles, rows, first = [], [], 0
    for owner, (length, new) in enumerate(zip(lengths, news, strict=True)):
        rows += [(owner, length - new + n) for n in range(new)]
        for done in range(0, new, TILE_QUERIES) if owner < 3 else ():
            tiles.append((first + done, min(TILE_QUERIES, new - done), length - new + done, owner))
        first += new
    got = torch.full_like(query, 7.0)
    scale = head_dim**-0.5
    attend_tiles(
        query, keys, values, tables, torch.tensor(tiles, dtype=torch.int32, device=DEVICE), got,
        scale=scale, window=window, softcap=softcap,
    )  # fmt: skip
    for row, (owner, position) in enumerate(rows[:-1]):
        expected = reference(query[row], keys, values, places[owner][: position + 1], window, softcap, scale)
        torch.testing.assert_close(got[row].double(), expected, atol=NEAR[dtype], rtol=1e-5)
    assert bool((got[-1] == 7.0).all())


@pytest.mark.parametrize(
    ("sequences", "kv_heads", "expected"), [(1, 8, 32), (4, 8, 8), (32, 8, 1), (128, 8, 1), (1, 1, 32)]
)
def test_few_sequences_are_cut_into_many_parts(sequences: int, kv_heads: int, expected: int) -> None:
    assert splits_for(sequences, kv_heads, 132) == expected
