"""What a run does, in order. Modules of a step are imported when it runs, in its own process.

Above: the entry. Below: a module for each.
"""

from __future__ import annotations

from .found import Found, Setting, Step
from .needs import TESTS


def _machine(setting: Setting) -> Found:
    from .machine import measure

    return measure(setting)


def _marked(setting: Setting) -> Found:
    from .correctness import check_marked

    return check_marked(setting)


def _kernels(setting: Setting) -> Found:
    from .correctness import check_kernels

    return check_kernels(setting)


def _engine(setting: Setting) -> Found:
    from .correctness import check_engine

    return check_engine(setting)


def _speed(setting: Setting) -> Found:
    from .speed import measure

    return measure(setting)


def _peer(setting: Setting) -> Found:
    from .peer import measure

    return measure(setting)


def _moving(setting: Setting) -> Found:
    from .moving import measure

    return measure(setting)


def _sharing(setting: Setting) -> Found:
    from .sharing import three_models

    return three_models(setting)


def _stranger(setting: Setting) -> Found:
    from .sharing import stranger

    return stranger(setting)


STEPS = (
    Step("machine", _machine, 90),
    Step("speed", _speed, 200),
    Step("peer", _peer, 120),
    Step("moving", _moving, 120),
    Step("kernels", _kernels, 120, TESTS),
    Step("marked", _marked, 120, TESTS),
    Step("sharing", _sharing, 60),
    Step("stranger", _stranger, 60),
    Step("engine", _engine, 240, TESTS),
)
"""What nothing else shows comes first: the run may be over before its last step is."""
