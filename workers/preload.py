"""Imported by fresh Ray worker processes before they get a model, so that a load does not wait for imports.

It runs beside other workers' streams, and nobody waits for it: so the imports run in a thread of low priority, which
ends with them. The process keeps its own.

What must not happen here, because a load may still choose devices and threads: any call that initialises CUDA, and with
it fixes the visible devices (`torch.cuda.is_available` is one); any operator of torch that is large enough to start
its threads.

The garbage collector rests meanwhile: tracing a heap that only grows cost 0.4-1.4 s of 4.9 s (2 cores, torch 2.13,
transformers 5.23). What the imports left is then frozen: it lives as long as the process.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import threading

from workers.gentle import IDLE_NICENESS, lower_priority


def _import_all() -> None:
    lower_priority(IDLE_NICENESS)
    # Every configuration class of transformers imports this when a directory is read; it pulls in parts of torch that
    # take most of a second. Only speed hangs on it.
    with contextlib.suppress(ImportError):
        importlib.import_module("transformers.utils.type_validators")
    importlib.import_module("workers.server")
    importlib.import_module("workers.text.opening")


gc.disable()
# Whatever it cannot import, a load will say.
_thread = threading.Thread(target=_import_all, name="preload", daemon=True)
_thread.start()
_thread.join()
gc.freeze()
gc.enable()
