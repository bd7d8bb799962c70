"""Products with quantized weights against the same with widened ones, by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.workers.triton_checks.place import DEVICE, NARROW, NEAR
from workers.text.gpu import narrow
from workers.text.gpu.narrow import MOST_ROWS, product
from workers.text.linear import QuantizedLinear


def quantized(
    inputs: int, outputs: int, kind: str, *, bias: bool = False, dtype: Any = torch.float32
) -> QuantizedLinear:
    torch.manual_seed(inputs + outputs)
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=dtype, device=DEVICE).requires_grad_(False)
    return QuantizedLinear.of(linear, kind)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 32), (576, 192), (1536, 40), (96, 7)])
@pytest.mark.parametrize("rows", [1, 5, 17, MOST_ROWS])
def test_few_rows_give_what_widened_weights_give(kind: str, inputs: int, outputs: int, rows: int) -> None:
    layer = quantized(inputs, outputs, kind, bias=rows % 2 == 1)
    hidden = torch.randn((rows, inputs), device=DEVICE)
    got = product(hidden, layer.weight, layer.scales, layer.bias, four_bits=layer.four_bits)
    torch.testing.assert_close(got, layer.widened(hidden), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_narrow_inputs_too(kind: str) -> None:
    layer = quantized(576, 64, kind, dtype=NARROW)
    hidden = torch.randn((4, 576), device=DEVICE).to(NARROW)
    got = product(hidden, layer.weight, layer.scales, layer.bias, four_bits=layer.four_bits)
    torch.testing.assert_close(got.float(), layer.widened(hidden).float(), atol=NEAR[NARROW], rtol=NEAR[NARROW])


def test_layers_use_it_for_few_rows_once_it_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(quantized(64, 96, "int4"), quantized(96, 32, "int8", bias=True))
    expected = {rows: model(torch.ones((1, rows, 64), device=DEVICE)) for rows in (3, MOST_ROWS + 1)}
    assert narrow.use(model) == 2
    asked: list[int] = []

    def counted(hidden: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        asked.append(hidden.shape[0])
        return product(hidden, *args, **named)

    for layer in model:
        layer.few_rows = counted
    for rows, made in expected.items():
        torch.testing.assert_close(model(torch.ones((1, rows, 64), device=DEVICE)), made, atol=1e-5, rtol=1e-5)
    assert asked == [3, 3]


@pytest.mark.parametrize("spoil", [lambda made: made * 1.1, lambda made: made.roll(1, 1), lambda made: 1 / 0])
def test_a_kernel_that_is_wrong_is_not_used(
    spoil: Callable[[torch.Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(quantized(64, 96, "int8"))
    monkeypatch.setattr(narrow, "product", lambda *args, **named: spoil(product(*args, **named)))
    assert narrow.use(model) == 0
    assert model[0].few_rows is None
