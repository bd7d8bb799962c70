"""What lies between a decode step's products against the same in plain operators, by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from tests.workers.triton_checks.place import DEVICE, NARROW, NEAR
from workers.text.gpu.kernels import add_norm, gate, rotate_and_keep

EPS = 1e-5
DTYPES = pytest.mark.parametrize(("dtype", "near"), [(d, NEAR[d]) for d in (torch.float32, NARROW)])


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def normed(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    value = value.double()
    return value / (value.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


@DTYPES
@pytest.mark.parametrize("width", [16, 576, 1000, 2048])
@pytest.mark.parametrize("has_after", [False, True])
def test_a_block_is_added_to_the_stream_and_normed(
    width: int, has_after: bool, dtype: torch.dtype, near: float
) -> None:
    stream, delta = draws(5, width).to(dtype), (3 * draws(5, width, seed=1)).to(dtype)
    weight, after = 1 + 0.1 * draws(width), 1 + 0.1 * draws(width, seed=2) if has_after else None
    added = normed(delta, after) if after is not None else delta.double()
    expected = stream.double() + 0.5 * added
    got = add_norm(stream, delta, weight, eps=EPS, after=after, scale=0.5)
    torch.testing.assert_close(stream.double(), expected, atol=2 * near, rtol=near)
    torch.testing.assert_close(got.double(), normed(stream, weight), atol=2 * near, rtol=near)


@DTYPES
def test_the_first_norm_leaves_the_stream_as_it_is(dtype: torch.dtype, near: float) -> None:
    stream, weight = draws(3, 96).to(dtype), draws(96)
    before = stream.clone()
    got = add_norm(stream, None, weight, eps=EPS)
    assert torch.equal(stream, before)
    torch.testing.assert_close(got.double(), normed(stream, weight), atol=2 * near, rtol=near)


@DTYPES
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("width", [8, 1024, 1500])
def test_the_gate_opens_as_the_activation_says(width: int, gelu: bool, dtype: torch.dtype, near: float) -> None:
    mixed = (8 * draws(4, 2 * width)).to(dtype)
    opened, passed = mixed.double().chunk(2, dim=1)
    expected = (F.gelu(opened, approximate="tanh") if gelu else F.silu(opened)) * passed
    torch.testing.assert_close(gate(mixed, gelu=gelu).double(), expected, atol=near, rtol=near)


@DTYPES
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotated"), [(4, 2, 16, 16), (3, 1, 80, 40), (2, 2, 64, 0), (8, 8, 32, 32)]
)
@pytest.mark.parametrize("is_normed", [False, True])
def test_heads_turn_and_keys_and_values_go_where_they_belong(
    heads: int, kv_heads: int, head_dim: int, rotated: int, is_normed: bool, dtype: torch.dtype, near: float
) -> None:
    rows = 5
    mixed = draws(rows, (heads + 2 * kv_heads) * head_dim).to(dtype)
    keys, values = (torch.full((40, kv_heads, head_dim), 7.0, dtype=dtype, device=DEVICE) for _ in range(2))
    places = torch.tensor([3, 39, 0, 17, 16], device=DEVICE)
    angles = 30 * draws(rows, rotated // 2) if rotated else None
    cosines, sines = (None, None) if angles is None else (0.9 * angles.cos(), 0.9 * angles.sin())
    norms = (1 + 0.1 * draws(head_dim), 1 + 0.1 * draws(head_dim, seed=4)) if is_normed else (None, None)

    def made(part: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        part = part.double() if norm is None else normed(part, norm)
        if cosines is None or sines is None:
            return part
        half = rotated // 2
        first, second, rest = part[..., :half], part[..., half:rotated], part[..., rotated:]
        cos, sin = cosines[:, None].double(), sines[:, None].double()
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)

    query, key, value = mixed.unflatten(1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    got = rotate_and_keep(
        mixed, keys, values, places, heads=heads, cosines=cosines, sines=sines,
        query_norm=norms[0], key_norm=norms[1], eps=EPS,
    )  # fmt: skip
    torch.testing.assert_close(got.double(), made(query, norms[0]), atol=2 * near, rtol=near)
    torch.testing.assert_close(keys[places].double(), made(key, norms[1]), atol=2 * near, rtol=near)
    assert torch.equal(values[places], value)
    elsewhere = torch.ones(40, dtype=torch.bool, device=DEVICE).index_fill(0, places, False)
    assert bool((keys[elsewhere] == 7.0).all())
    assert bool((values[elsewhere] == 7.0).all())
