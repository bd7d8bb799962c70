"""The model store: models on disk, whole or not there at all. Its README is the design note.

Above it: the orchestrator (which asks `find`, `list_stored`, `footprint` and `splitting`: no network, no torch) and the
`hostler` command (which runs `python -m orchestrator.store`). Below it: the Hub, pip, and `workers.convert`.
"""

from orchestrator.store.footprint import Footprint, adapter_bytes, footprint
from orchestrator.store.kind import kind_of
from orchestrator.store.layout import StoredModel, list_stored, resolve_models_dir
from orchestrator.store.source import find
from orchestrator.store.split import Splitting, splitting

__all__ = [
    "Footprint",
    "Splitting",
    "StoredModel",
    "adapter_bytes",
    "find",
    "footprint",
    "kind_of",
    "list_stored",
    "resolve_models_dir",
    "splitting",
]
