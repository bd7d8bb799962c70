"""A child process that turns text into phonemes: `python -m workers.speaking.espeak`.

Above: `phonemes.py`, which starts it and speaks JSON lines with it: `{"voice", "text", "clusters"}` in, `{"sentences"}`
or `{"error"}` out. Below: the phonemizer of the `piper-tts` package, with espeak-ng in it. It is a process of its own
because espeak-ng is C code with global state that reads strangers' text, and under a licence (GPL-3.0) of its own.
Texts are never logged.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import resource
import sys
import types
from typing import Any

_MAX_MEMORY_BYTES = 1 << 30


def _phonemizer() -> Any:
    """Import the phonemizer alone: the package's own `__init__` would bring onnxruntime in."""
    spec = importlib.util.find_spec("piper")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("piper-tts is not installed")
    package = types.ModuleType("piper")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["piper"] = package
    from piper.phonemize_espeak import EspeakPhonemizer  # type: ignore[import-not-found, unused-ignore]

    return EspeakPhonemizer()


def main() -> int:
    """Answer line by line until the input ends."""
    with contextlib.suppress(ValueError, OSError):  # not every system has this bound
        resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    phonemizer = _phonemizer()
    for line in sys.stdin:
        try:
            asked = json.loads(line)
            clusters = {tuple(cluster) for cluster in asked["clusters"]} or None
            answer: dict[str, Any] = {"sentences": phonemizer.phonemize(asked["voice"], asked["text"], clusters)}
        except Exception as error:
            answer = {"error": type(error).__name__}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
