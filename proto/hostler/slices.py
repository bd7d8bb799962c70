"""Short time slices: what answers people comes to a core at once, also where model threads fill them all.

Above: the gateway and the worker, for threads that only hand things on. Below: Linux's scheduler. Since 6.12 a thread
may ask for its own slice (`sched_setattr`, in kernel/sched/syscalls.c; no privilege is needed), and one with a shorter
slice that wakes up takes the core from one with a longer. What it gets of the processor in all stays the same.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

_SYSCALL = {"x86_64": 314, "aarch64": 274, "riscv64": 274}
_SHORT_NS = 700_000
"""The kernel's own is 1.4 ms with two cores, more with more. One too short for a thread's turn (0.1 ms, the least) made
the gateway wait longer than none: it lost the core in the middle, many times over."""
_RESET_ON_FORK = 1


def ask_for_short_slices(*, inherited: bool) -> bool:
    """Ask for this thread; return whether the kernel took it. Older kernels take it, too, and do nothing.

    Args:
        inherited: for the threads and processes that it starts from now on, too. Not where some of them compute.
    """
    number = _SYSCALL.get(platform.machine())
    if platform.system() != "Linux" or number is None:
        return False
    flags = 0 if inherited else _RESET_ON_FORK
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    # struct sched_attr: size, policy (SCHED_OTHER), flags, nice, priority, runtime, deadline, period.
    attributes = struct.pack("=IIQiIQQQ", 48, 0, flags, niceness, 0, _SHORT_NS, 0, 0)
    return int(ctypes.CDLL(None, use_errno=True).syscall(number, 0, attributes, 0)) == 0
