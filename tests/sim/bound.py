"""What it takes at least, had one known all that was to come: a linear programme whose optimum nobody can beat who
begins to serve requests in the order in which they came.

Above it: `figures.py`. Below it: traces, hardware, scipy's HiGHS. The line is that of flow-based offline bounds on
caching with sizes (Berger, Beckmann and Harchol-Balter 2018), with three tiers instead of one.

Between two requests for the same model something holds it, or nothing does: it stays on a device (costs nothing), it
is in host memory (costs a wake), its file stays in the page cache (costs a load from there), or it is read from disk.
At each request the device memory is shared by those that stay and the one that is asked for, with its smallest KV
cache; device and host memory together by those that stay and those that sleep; host memory by the page cache's files.

It lies below the best that could really be done: it lets a model be held in part, takes all devices for one, lets
models move between them and wake on any, gives all host memory to the page cache and to sleepers both, and knows
neither how long a request runs nor how long a model takes to go. The fewer and larger the models, the further below.
It lies above what can be done by serving out of order: one load for callers who came at different times, with others
between them, is the one way to do with less.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from orchestrator import models
from orchestrator.policy.room import least_bytes

from .hardware import GB, Hardware
from .traces import Served, Trace


@dataclass(frozen=True, slots=True)
class Gap:
    """From one request for a model to its next one, as steps of the trace: held over the steps `first` to `last`."""

    model: Served
    first: int
    last: int


def steps_of(trace: Trace) -> list[Served]:
    """Return the models in the order in which they are asked for; the same twice in a row is once."""
    steps: list[Served] = []
    for asked in trace.asked:
        if not steps or steps[-1].name != asked.model:
            steps.append(trace.by_name[asked.model])
    return steps


def gaps_of(steps: list[Served]) -> list[Gap]:
    """Return every gap between two requests for the same model."""
    last: dict[str, int] = {}
    gaps = []
    for step, model in enumerate(steps):
        if model.name in last:
            gaps.append(Gap(model, last[model.name] + 1, step - 1))
        last[model.name] = step
    return gaps


def least_reload_s(trace: Trace, hardware: Hardware | None = None) -> float:
    """Return the seconds of loads and wakes that no one in order of arrival can do without, first loads included.

    Raises:
        RuntimeError: the solver found no optimum.
    """
    hardware = hardware or Hardware()
    steps = steps_of(trace)
    gaps, num_steps = gaps_of(steps), len(steps)
    device_gb = np.array([least_bytes(models.demand(m.spec, m.located)) / GB for m in steps])
    total_gb = sum(trace.device_gb)
    room_gb = np.stack([total_gb - device_gb, total_gb + trace.host_gb - device_gb, np.full(num_steps, trace.host_gb)])
    num_gaps = len(gaps)
    # Columns: each gap's three ways to be held, then how full each of the three memories is at each step.
    fills = 3 * num_gaps + np.arange(3 * num_steps).reshape(3, num_steps)
    rows, columns, values = [], [], []

    def put(row: int, column: int, value: float) -> None:
        rows.append(row)
        columns.append(column)
        values.append(value)

    for memory in range(3):  # How full it is at a step: as at the last one, and what begins, less what has ended.
        for step in range(num_steps):
            put(memory * num_steps + step, int(fills[memory, step]), 1.0)
            if step:
                put(memory * num_steps + step, int(fills[memory, step - 1]), -1.0)
    saved_s = np.zeros(3 * num_gaps + 3 * num_steps)
    least_s = sum(hardware.load_s(m.weight_bytes, cached=False) for m in steps_once(steps))
    for index, gap in enumerate(gaps):
        weight_bytes = gap.model.weight_bytes
        footprint = gap.model.located.footprint
        held_gb = least_bytes(models.demand(gap.model.spec, gap.model.located)) / GB
        asleep_gb, file_gb = models.sleep_bytes(footprint, "cuda") / GB, weight_bytes / GB
        disk_s = hardware.load_s(weight_bytes, cached=False)
        least_s += disk_s
        ways = (
            (disk_s, ((0, held_gb), (1, held_gb))),
            (disk_s - hardware.wake_s(weight_bytes), ((1, asleep_gb),)),
            (disk_s - hardware.load_s(weight_bytes, cached=True), ((2, file_gb),)),
        )
        for way, (saves_s, takes) in enumerate(ways):
            column = 3 * index + way
            saved_s[column] = saves_s
            for memory, num_gb in takes:
                put(memory * num_steps + gap.first, column, -num_gb)
                if gap.last + 1 < num_steps:
                    put(memory * num_steps + gap.last + 1, column, num_gb)
    once = coo_array(
        (np.ones(3 * num_gaps), (np.arange(3 * num_gaps) // 3, np.arange(3 * num_gaps))),
        shape=(num_gaps, len(saved_s)),
    )
    equal = coo_array((values, (rows, columns)), shape=(3 * num_steps, len(saved_s)))
    most = np.concatenate([np.ones(3 * num_gaps), np.maximum(0.0, room_gb).ravel()])
    found = linprog(
        -saved_s,
        A_ub=once.tocsr(),
        b_ub=np.ones(num_gaps),
        A_eq=equal.tocsr(),
        b_eq=np.zeros(3 * num_steps),
        bounds=np.stack([np.zeros(len(saved_s)), most], axis=1),
        method="highs-ds",
    )
    if found.status != 0:
        raise RuntimeError(f"no optimum for {trace.name}: {found.message}")
    return float(least_s + found.fun)


def steps_once(steps: list[Served]) -> list[Served]:
    """Return every model that is asked for at all."""
    return list({model.name: model for model in steps}.values())
