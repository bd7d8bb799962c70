"""Where several gateway processes keep their numbers together. Above: `__main__`, `metrics`. Below: the file system.

prometheus-client decides when it is first imported where numbers are kept, so this module does not import it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def share_numbers(directory: Path) -> None:
    """Keep this process's numbers in a directory of all gateways; drop what dead ones had in flight, and no more."""
    directory.mkdir(mode=0o700, exist_ok=True)
    os.environ[DIRECTORY_VARIABLE] = str(directory)
    for path in directory.glob("gauge_live*_*.db"):
        pid = path.stem.rpartition("_")[2]
        if pid.isdigit() and not _lives(int(pid)):
            with suppress(OSError):  # Another gateway was quicker.
                path.unlink()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
