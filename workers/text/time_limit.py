"""A time limit on Python code that a model brings along, its chat template, in whichever thread runs it.

Above: `prompts`; below: the interpreter. A template's sandbox bounds what it may touch, not for how long it may loop.
The limit is an exception that the interpreter raises in that thread at its next bytecode, so it ends loops, not one
long operation in C.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TookTooLong(Exception):
    """The code inside `at_most` was stopped."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Run what is inside for so long at most, in this thread.

    Raises:
        TookTooLong: it did not end by itself.
    """
    thread_id = ctypes.c_ulong(threading.get_ident())
    lock = threading.Lock()
    ended = stopped = False

    def stop() -> None:
        nonlocal stopped
        with lock:
            if not ended:
                stopped = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread_id, ctypes.py_object(TookTooLong))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            ended = True
        if stopped:
            # If it is still under way it must not hit whoever uses this thread next.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread_id, None)
