"""What loads have taught: measured memory and times of each model, as it was configured. Pure; effects store it.

Above it: the cluster's views and `accounting.py`. Below it: models. Before the first load the footprint's estimate and
plain rules stand in; afterwards the measurement does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from orchestrator.models import Footprint, Located, ModelSpec, context_tokens

FIXED_LOAD_S = 1.5
LOAD_BYTES_PER_S = 1e9
FIXED_WAKE_S = 0.1
WAKE_BYTES_PER_S = 4e9
HAND_OVER_BYTES_PER_S = 4e9
NEWEST_WEIGHS = 0.3
"""Share of the newest time in the running mean of times."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was seen of one model, as configured, on one kind of device. Zero: never seen.

    Attributes:
        own_bytes: the most that a worker held on its device beside its KV cache.
        sleep_bytes: what it held in host memory asleep.
        load_s: from a blank worker to ready.
        wake_s: from asleep to ready.
        hand_over_s: from a blank worker to ready with what a sleeper held.
    """

    own_bytes: int = 0
    sleep_bytes: int = 0
    load_s: float = 0.0
    wake_s: float = 0.0
    hand_over_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Times:
    """Expected seconds."""

    load_s: float
    wake_s: float
    hand_over_s: float


def key_of(spec: ModelSpec, footprint: Footprint, kind: str) -> str:
    """Return what a measurement holds for: the same files served the same way."""
    context = context_tokens(spec, footprint)
    adapters = ",".join(sorted(path for _, path in spec.adapters))
    what = (spec.source, spec.revision or "", spec.dtype, spec.quantize, context, spec.max_running, adapters, kind)
    beams = (f"{spec.beams} beams",) if spec.beams > 1 else ()  # Keys of measurements that were taken before stay.
    return "|".join(str(part) for part in (*what, footprint.weight_bytes, *beams))


@dataclass(slots=True)
class Experience:
    """Everything measured, by `key_of`."""

    by_key: dict[str, Measured] = field(default_factory=dict)

    def of(self, spec: ModelSpec, located: Located | None, kind: str) -> Measured:
        """Return what is known; all zero when nothing is."""
        if located is None:
            return Measured()
        return self.by_key.get(key_of(spec, located.footprint, kind), Measured())

    def expect(self, spec: ModelSpec, located: Located | None, kind: str) -> Times:
        """Return how long a load and a wake will take, as far as one can know."""
        seen = self.of(spec, located, kind)
        weights = located.footprint.weight_bytes if located else 0
        load_s = seen.load_s or FIXED_LOAD_S + weights / LOAD_BYTES_PER_S
        return Times(
            load_s,
            seen.wake_s or FIXED_WAKE_S + weights / WAKE_BYTES_PER_S,
            seen.hand_over_s or min(load_s, FIXED_LOAD_S + weights / HAND_OVER_BYTES_PER_S),
        )

    def learn(self, spec: ModelSpec, located: Located, kind: str, **seen: Any) -> bool:
        """Take a measurement in: times by running mean, bytes as they are. Return whether it changed noticeably."""
        key = key_of(spec, located.footprint, kind)
        before = self.by_key.get(key, Measured())
        for name in ("load_s", "wake_s", "hand_over_s"):
            if name in seen and (old := getattr(before, name)):
                seen[name] = old + NEWEST_WEIGHS * (seen[name] - old)
        after = self.by_key[key] = replace(before, **seen)
        return any(_differs(getattr(before, name), getattr(after, name)) for name in seen)

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {key: asdict(measured) for key, measured in self.by_key.items()}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Experience:
        """Return what `as_json` gave; entries that are not ours are left out."""
        found: dict[str, Measured] = {}
        for key, entry in values.items():
            try:
                found[key] = Measured(
                    int(entry["own_bytes"]),
                    int(entry["sleep_bytes"]),
                    float(entry["load_s"]),
                    float(entry["wake_s"]),
                    float(entry.get("hand_over_s", 0.0)),
                )
            except (KeyError, TypeError, ValueError):
                continue
        return Experience(found)


def _differs(before: float, after: float) -> bool:
    return abs(after - before) > 0.02 * max(abs(before), abs(after))
