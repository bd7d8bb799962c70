"""Which gateway processes live: each holds a lock on a file, which the kernel drops with the process. Above: `store`.

So a background response whose process died is known at once, without a heartbeat and without trusting clocks or pids.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from contextlib import suppress
from pathlib import Path


class Runner:
    """This process, as the others see it.

    Args:
        database: the store's file; the lock files stand beside it.
    """

    def __init__(self, database: Path) -> None:
        self._database = database
        self.name = uuid.uuid4().hex
        # Locked before it has its name, so that nobody ever finds it unlocked.
        unnamed = database.with_name(f"{database.name}.new-{self.name}")
        self._descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        unnamed.rename(self._path(self.name))
        self._sweep()

    def lives(self, name: str) -> bool:
        """Return whether the process of that name lives; the file of a dead one is removed."""
        if name == self.name:
            return True
        try:
            descriptor = os.open(self._path(name), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        else:
            with suppress(FileNotFoundError):
                self._path(name).unlink()
            return False
        finally:
            os.close(descriptor)

    def _sweep(self) -> None:
        """Remove what dead processes left."""
        prefix = self._path("").name
        for path in self._database.parent.glob(f"{prefix}*"):
            self.lives(path.name.removeprefix(prefix))

    def close(self) -> None:
        """Be dead to the others."""
        with suppress(FileNotFoundError):
            self._path(self.name).unlink()
        os.close(self._descriptor)

    def _path(self, name: str) -> Path:
        return self._database.with_name(f"{self._database.name}.runner-{name}")
