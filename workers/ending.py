"""Ending a worker that can serve no more: whoever placed it sees its death and replaces it.

Above: engines. Below: the operating system, and torch, if it is there.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

log = logging.getLogger(__name__)


def end_process(reason: str) -> None:
    """End this worker at once, whatever its threads are doing."""
    log.critical("worker ends", extra={"reason": reason})
    logging.shutdown()
    os._exit(1)


def end_if_device_is_lost() -> None:
    """After a failure: end this worker if its GPU's context is broken, where every later step would fail, too."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except Exception as error:
        end_process(f"the GPU answers nothing any more: {error}"[:300])


def or_end(run: Callable[[], None], name: str) -> None:
    """Run what a worker cannot be without. Should it fail, no worker is better than one that only listens."""
    try:
        run()
    except BaseException as error:
        log.exception("%s failed", name)
        end_process(f"{name} failed: {type(error).__name__}")
