"""Runs a converter as a process of its own and relays its progress.

Above it: `pull`, `whisper`. Below it: `python -m workers.convert` and
`workers.convert_whisper`, the only places where a model's tensors are handled. The two
rooms meet only at those command lines and its JSON lines.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from hostler.errors import BY_REASON, ModelLoadFailed

from orchestrator.store.progress import Progress, Report
from orchestrator.store.publish import Workplace, require_space

CONVERTER = "gguf-1"
"""Goes into manifests; raise it when the converter's output changes."""

_MAGIC = b"GGUF"
# 4-bit blocks become 16-bit values; the true size is known only once the file is parsed.
_GROWTH = 4


def check_is_gguf(path: Path) -> None:
    """Refuse a file that is not GGUF.

    Raises:
        ModelLoadFailed: wrong first bytes, or unreadable.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelLoadFailed(f"{path.name} cannot be read: {error.strerror}.") from error
    if magic != _MAGIC:
        raise ModelLoadFailed(f"{path.name} is not a GGUF file.")


def convert_into(place: Workplace, gguf: Path, report: Report) -> None:
    """Convert `gguf` into the (emptied) partial directory of `place`.

    Raises:
        ModelLoadFailed, InvalidRequest: with the converter's own sentence; the partial directory is removed.
    """
    check_is_gguf(gguf)
    shutil.rmtree(place.partial, ignore_errors=True)
    place.partial.mkdir(parents=True)
    require_space(place.partial, _GROWTH * gguf.stat().st_size)
    run_converter(place, "workers.convert", gguf, place.partial, report)


def run_converter(place: Workplace, module: str, source: Path, destination: Path, report: Report) -> None:
    """Run `python -m MODULE SOURCE DESTINATION --json` and relay its progress.

    Raises:
        ModelLoadFailed, InvalidRequest: with the converter's own sentence; the partial directory is removed.
    """
    # -P would hide a checkout that is run in place, so the child inherits the path as it is.
    command = [sys.executable, "-m", module, str(source), str(destination), "--json"]
    failure: dict[str, str] | None = None
    finished = False
    with (
        tempfile.TemporaryFile() as stderr,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, pass_fds=(place.lock_fd,)
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue  # a library's own print
                if event["stage"] == "convert":
                    report(Progress("convert", event["done_bytes"], event["total_bytes"], source.name))
                elif event["stage"] == "error":
                    failure = event
                elif event["stage"] == "done":
                    finished = True
        except BaseException:
            process.kill()
            raise
        status = process.wait()
        stderr.seek(0)
        last_words = stderr.read().decode(errors="replace").strip().splitlines()[-1:]
    if finished and status == 0:
        return
    shutil.rmtree(place.partial, ignore_errors=True)
    if failure is not None:
        raise BY_REASON.get(failure["reason"], ModelLoadFailed)(failure["message"])
    if status < 0:
        raise ModelLoadFailed(
            f"The conversion of {source.name} was killed (signal {-status}); memory may have run out."
        )
    raise ModelLoadFailed(f"The conversion of {source.name} failed: {' '.join(last_words) or f'status {status}'}")
