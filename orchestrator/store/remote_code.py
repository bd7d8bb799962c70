"""Which repositories that bring Python code can be served without running it.

Above it: `download`, which asks once the small files are there, before the weights. Below it: those files, and
`python -m workers.architectures`, the only place where transformers is imported for this. The code of an
architecture that transformers has itself is left on the Hub, and its `auto_map` says nothing to us.
"""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from hostler.errors import InvalidRequest, ModelLoadFailed

from orchestrator.store.footprint import read_json

log = logging.getLogger(__name__)

_ASK_TIMEOUT_S = 120.0
_MODEL_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")

IsKnown = Callable[[str], bool]


def is_known_to_transformers(model_type: str) -> bool:
    """Ask, in a process of its own (seconds), whether transformers itself implements a model type.

    Raises:
        ModelLoadFailed: it could not be asked.
    """
    if not _MODEL_TYPE.fullmatch(model_type):
        return False
    command = [sys.executable, "-m", "workers.architectures", model_type]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_TIMEOUT_S, check=True)
        return bool(json.loads(done.stdout.splitlines()[-1])["known"])
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError) as error:
        complaint = str(getattr(error, "stderr", None) or error)[-500:]
        log.exception("transformers could not be asked for its model types", extra={"stderr": complaint})
        raise ModelLoadFailed("transformers could not be asked which model types it knows; see the log.") from error


def refuse_needed_code(hub_id: str, directory: Path, is_known: IsKnown = is_known_to_transformers) -> None:
    """Refuse a model that cannot be served without Python code of its own.

    One that names such code passes if transformers has its architecture, and its tokenizer is there as data.

    Raises:
        InvalidRequest: it needs its code; says which key allows that.
        ModelLoadFailed: its config is not JSON, or transformers could not be asked.
    """
    config = read_json(directory / "config.json")
    tokenizer = directory / "tokenizer_config.json"
    tokenizer_has_code = tokenizer.is_file() and bool(read_json(tokenizer).get("auto_map"))
    if not config.get("auto_map") and not tokenizer_has_code:
        return
    model_type = str(config.get("model_type") or "")
    if not is_known(model_type):
        raise InvalidRequest(
            f"{hub_id} brings Python code of its own, and transformers has none for its model type "
            f"{model_type[:100]!r}. To run that code, set trust_remote_code: true for this model in hostler.yaml.",
            param="model",
        )
    if tokenizer_has_code and not (directory / "tokenizer.json").is_file():
        raise InvalidRequest(
            f"The tokenizer of {hub_id} is Python code of its own: there is no tokenizer.json. "
            "To run that code, set trust_remote_code: true for this model in hostler.yaml.",
            param="model",
        )
    log.info("the Python code of a model is left out", extra={"model": hub_id, "model_type": model_type})
