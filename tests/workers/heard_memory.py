"""What hearing makes a process hold, as a line of JSON: `python -m tests.workers.heard_memory MODEL DTYPE BEAMS`.

Above: `test_hearing_memory.py`. Below: the engine, loaded as a worker loads it, with eight windows of noise at once.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading

import numpy as np

import workers.preload  # noqa: F401 - what a worker's process holds before it has a model
from workers.engine import LoadSpec
from workers.hearing.decoding import Wanted
from workers.hearing.listening import Listener, Recording
from workers.hearing.opening import load
from workers.hearing.telling import HeardWindow
from workers.hearing.voice import Window
from workers.memory import MemoryMeter

_WINDOW_SAMPLES = 28 * 16_000
_LOOK_EVERY_S = 0.002


async def _hear(listener: Listener) -> None:
    listener.start(asyncio.get_running_loop(), lambda: None)
    draws = np.random.default_rng(0)
    # A temperature, so that nothing is tried again; words' times, for they take attention of their own.
    wanted = Wanted(language="en", temperature=0.2)
    recordings = [Recording(wanted, True, str(number)) for number in range(8)]
    for recording in recordings:
        samples = draws.normal(0, 3000, _WINDOW_SAMPLES).astype(np.int16)
        listener.submit(recording, 0, Window(0.0, samples))
    for recording in recordings:
        heard = await recording.results.get()
        assert isinstance(heard, HeardWindow), heard
        listener.forget(recording)
    await listener.close()


def main(path: str, dtype: str, beams: str) -> None:
    """Load, hear, and print the bytes held once loaded and the most that were held while hearing."""
    _, listener = load(LoadSpec("m", path, dtype=dtype, beams=int(beams), num_threads=1), lambda *_: None)
    meter, done = MemoryMeter(), threading.Event()
    loaded = meter.look().device

    def watch() -> None:
        while not done.wait(_LOOK_EVERY_S):
            meter.look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        asyncio.run(_hear(listener))
    finally:
        done.set()
        watcher.join()
    sys.stdout.write(json.dumps({"loaded": loaded, "peak": meter.look().peak_device}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
