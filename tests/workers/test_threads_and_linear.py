"""Thread choice is a pure rule over measurements; packed linear layers compute what plain ones do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from workers.text.linear import PackedLinear, pack
from workers.text.threads import Threads, choose


@pytest.mark.parametrize(
    ("seconds", "limit", "expected"),
    [
        ({1: 1.0, 2: 0.5, 4: 0.26, 8: 0.14}, 8, 8),
        ({1: 1.0, 2: 0.9}, 2, 1),
        ({1: 1.0, 2: 0.55, 4: 0.5}, 4, 2),
        ({1: 1.0}, 1, 1),
        ({1: 1.0, 2: 0.5}, 3, 2),
    ],
)
def test_threads_double_only_while_it_pays(seconds: dict[int, float], limit: int, expected: int) -> None:
    assert choose(seconds.__getitem__, limit) == expected


@pytest.mark.parametrize("rows", [1, 5, 16, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_computes_what_the_plain_one_does(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 160, bias=bias)).to(torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(1, rows, 96, dtype=torch.bfloat16)
    expected = model(hidden)
    if not pack(model):
        pytest.skip("this processor has no bfloat16 in oneDNN")
    assert isinstance(model[0], PackedLinear)
    torch.testing.assert_close(model(hidden), expected, atol=0.02, rtol=0.02)


def test_float32_layers_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    assert pack(model) == 0
    assert type(model[0]) is nn.Linear


def test_prefill_steps_and_decode_steps_have_thread_counts_of_their_own() -> None:
    threads = Threads(decode=1, prefill=2)
    assert [threads.for_rows(n) for n in (1, 16, 64, 500)] == [1, 1, 2, 2]
