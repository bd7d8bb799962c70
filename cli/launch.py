"""Becomes one supervised command that dies with its parent. Run as a script by `cli.supervisor`; stdlib only.

    python -I -S launch.py PARENT_PID SIGNAL COMMAND…

The kernel's parent-death signal is set here, in the child itself and just before exec: setting it from a
`preexec_fn` would force a plain fork() of a process that runs gRPC threads. The signal fires when the
*thread* that spawned us ends, so the supervisor spawns from its main thread.
"""

from __future__ import annotations

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Set the parent-death signal, make sure that the parent still lives, exec the command."""
    parent, death_signal, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
