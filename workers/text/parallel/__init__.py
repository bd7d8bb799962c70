"""One model over several devices. Above: `opening.py`; the engine sees a `Runner` like any other.

`opening.py` here chooses between tensor parallelism (`runner.py`, one process a device) and layers over devices
(`layers.py`, one process).
"""
