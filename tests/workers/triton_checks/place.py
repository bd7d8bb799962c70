"""Where the kernels of these checks run: on the CPU by Triton's interpreter, or on a card.

`HOSTLER_KERNELS_ON=cuda:0 python -m pytest tests/workers/triton_checks` compiles and runs them there.
"""

from __future__ import annotations

import os

import torch

DEVICE = torch.device(os.environ.get("HOSTLER_KERNELS_ON", "cpu"))
ON_CPU = DEVICE.type == "cpu"
# The interpreter has no bfloat16; the code is the same.
NARROW = torch.float16 if ON_CPU else torch.bfloat16
NEAR = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""How near results must come that are rounded to a dtype."""


def choose_place() -> None:
    """Have kernels that are defined from now on run there."""
    if ON_CPU:
        os.environ.setdefault("TRITON_INTERPRET", "1")
