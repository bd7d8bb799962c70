"""Text to phonemes, through a child process (`espeak.py`) that is watched and replaced when it fails.

Above: `piper.py`, `vits.py`, in the engine's thread. Below: that process. Blocking; milliseconds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence

from hostler.errors import Internal, ModelLoadFailed

from workers import memory

log = logging.getLogger(__name__)

_TIMEOUT_S = 10.0
_MAX_ANSWER_BYTES = 4 << 20


class Phonemizer:
    """Owns the child. One thread uses it.

    Raises:
        ModelLoadFailed: the package with espeak-ng is not installed.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("piper") is None:
            raise ModelLoadFailed(
                "This voice reads phonemes, and espeak-ng, which makes them, is not installed: "
                "pip install 'hostler[piper]'."
            )
        self._child: subprocess.Popen[bytes] | None = None

    def sentences(self, voice: str, text: str, clusters: Sequence[Sequence[str]] = ()) -> list[list[str]]:
        """Return the phonemes of each sentence of `text`, punctuation among them, as espeak-ng's `voice` reads it.

        Args:
            clusters: phonemes that are one symbol together.

        Raises:
            Internal: espeak-ng cannot, or not in time.
        """
        question = json.dumps({"voice": voice, "text": text, "clusters": [list(cluster) for cluster in clusters]})
        try:
            answer = json.loads(self._ask(question.encode() + b"\n"))
        except (OSError, ValueError, EOFError) as error:
            log.warning("the phonemizer failed", extra={"reason": type(error).__name__})
            self.close()
            raise Internal("The text could not be turned into phonemes; the server's log has the details.") from None
        if "error" in answer:
            log.warning("the phonemizer refused a text", extra={"reason": answer["error"]})
            raise Internal("The text could not be turned into phonemes; the server's log has the details.")
        sentences: list[list[str]] = answer["sentences"]
        return sentences

    def close(self) -> None:
        """End the child; the next question starts another."""
        child, self._child = self._child, None
        if child is not None:
            memory.leave_out(child.pid)
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def _ask(self, question: bytes) -> bytes:
        child = self._child or self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(question)
        child.stdin.flush()
        answer, deadline = b"", time.monotonic() + _TIMEOUT_S
        while not answer.endswith(b"\n"):
            readable, _, _ = select.select([child.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not readable or len(answer) > _MAX_ANSWER_BYTES:
                raise TimeoutError
            if not (block := os.read(child.stdout.fileno(), 65536)):
                raise EOFError
            answer += block
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "workers.speaking.espeak"]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        memory.count_in(self._child.pid)
        return self._child
