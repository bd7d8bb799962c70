"""Imported by fresh Ray worker processes before they get a model, so that a load does not wait for imports.

The garbage collector rests meanwhile: tracing a heap that only grows cost 0.4-1.4 s of 4.9 s (2 cores, torch 2.13,
transformers 5.23). What the imports left is then frozen: it lives as long as the process.
"""

from __future__ import annotations

import contextlib
import gc

gc.disable()

# Every configuration class of transformers imports this when a directory is read; it pulls in parts of torch that take
# most of a second. Only speed hangs on it.
with contextlib.suppress(ImportError):
    import transformers.utils.type_validators  # noqa: F401

import workers.server  # noqa: E402
import workers.text.opening  # noqa: E402, F401

gc.freeze()
gc.enable()
