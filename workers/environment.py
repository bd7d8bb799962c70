"""Environment variables that come with a load, to a process whose imports are done. Above: `host.py`. Below: torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from hostler.errors import ModelLoadFailed


def enter_environment(environment: Mapping[str, str]) -> None:
    """Set variables for libraries that were imported ahead of time, but have not looked at any device yet.

    The driver reads the visible devices when CUDA is first used. The number of OpenMP threads was read when torch was
    imported, so torch is told; our own kernels are told with each model.

    Raises:
        ModelLoadFailed: CUDA was used before, so that other devices can no longer be chosen.
    """
    if all(os.environ.get(name) == value for name, value in environment.items()):
        return
    os.environ.update(environment)
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if "CUDA_VISIBLE_DEVICES" in environment and torch.cuda.is_initialized():
        raise ModelLoadFailed("This worker process has used CUDA before; its devices can no longer be chosen.")
    if (threads := environment.get("OMP_NUM_THREADS", "")).isdecimal() and int(threads) > 0:
        torch.set_num_threads(int(threads))
