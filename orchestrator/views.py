"""What the policy sees and says: frozen views of the cluster, one demand, and the plan or the refusal. Pure data.

Above it: `state.py`, which makes views, and `loading.py`, which carries plans out. Below it: nothing. Seconds are the
scheduler's monotonic clock, bytes are bytes, rates are uses a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class Part:
    """What is held, or will be, on one device."""

    device: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class DeviceView:
    """One device.

    Attributes:
        usable_bytes: its budget less what other programs make unusable of it.
        node: the machine it is in; empty for this one.
    """

    id: str
    usable_bytes: int
    node: str = ""


@dataclass(frozen=True, slots=True)
class NodeView:
    """One machine: `sleep_bytes` of its host memory may be held by sleeping models, all of them together."""

    id: str
    sleep_bytes: int = 0


class HolderState(Enum):
    """A promised or loading holder, a ready one, one that sleeps in host memory."""

    COMING = "coming"
    READY = "ready"
    ASLEEP = "asleep"


@dataclass(frozen=True, slots=True)
class HolderView:
    """Something that holds memory: a replica, or a load that was promised its place.

    Attributes:
        parts: what it holds on devices; none while asleep.
        busy: it has requests, or is about to get some: it just became ready, or was just handed out.
        ready_since_s: when it last became ready; what was just loaded should be of use before it goes.
        spare_bytes: what its KV cache could give up on its one device; 0 for one that is split.
        sleep_bytes: host memory that it holds asleep, or would; None when it cannot sleep.
        load_s: expected time to bring it back from disk or page cache.
        wake_s: expected time to bring it back from sleep.
        hand_over_s: expected time until a new worker on another device of its node serves what it holds asleep; None
            when nobody can take that over.
        uses_per_s: expected rate of requests that find it idle or missing.
        lasting_per_s: the same over the next minutes, which is what host memory is kept for; None: as now.
        group: models of one group may not share a device, where the group says so.
        batch: it serves nothing but batch work now.
        wakes_on: devices that it can wake on; None: any of its node.
    """

    id: str
    model: str
    parts: tuple[Part, ...]
    state: HolderState = HolderState.READY
    busy: bool = False
    pinned: bool = False
    last_used_s: float = 0.0
    ready_since_s: float = 0.0
    spare_bytes: int = 0
    sleep_bytes: int | None = None
    load_s: float = 1.0
    wake_s: float = 0.1
    hand_over_s: float | None = None
    uses_per_s: float = 0.0
    lasting_per_s: float | None = None
    group: str = ""
    batch: bool = False
    node: str = ""
    wakes_on: frozenset[str] | None = None

    def bytes_on(self, device: str) -> int:
        """Return what it holds on one device."""
        num_bytes = 0  # A loop, no generator: large clusters ask this thousands of times for one decision.
        for part in self.parts:
            if part.device == device:
                num_bytes += part.num_bytes
        return num_bytes

    @property
    def reserved_bytes(self) -> int:
        """What it holds on all devices together."""
        num_bytes = 0
        for part in self.parts:
            num_bytes += part.num_bytes
        return num_bytes


@dataclass(frozen=True, slots=True)
class ClusterView:
    """Everything a decision may depend on, beside the demand. `apart`: groups whose models may not share a device."""

    devices: tuple[DeviceView, ...]
    holders: tuple[HolderView, ...]
    nodes: tuple[NodeView, ...] = ()
    now_s: float = 0.0
    apart: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Demand:
    """What one model needs. The KV cache is elastic between its floor and what it could ever use.

    Attributes:
        device: the one device it is pinned to; None for any.
        base_bytes: weights and workspace.
        kv_floor_bytes: less than this is not worth loading.
        kv_context_bytes: one full context.
        kv_want_bytes: every running request at full context.
        num_others: other models that will want a share of the same devices.
        workspace_bytes: of base_bytes, what every part of a split model needs in full.
        max_parts: over how many devices of one node it may be split; 1 for a model that cannot be.
        kv_copies: of a split into 2, 3 … parts, on how many parts each key and value is kept; 1 where it is not said.
        waited_s: how long the one who has waited longest has waited.
        batch: nobody but batch work waits.
        replica: one more beside a ready one; it takes free room only.
        load_s: expected time to load it.
        uses_per_s: expected rate of requests for it.
        sleep_bytes: host memory that it would hold asleep.
        quantized_bytes: what base_bytes would be with weights quantized, by kind; for advice.
    """

    model: str
    device: str | None
    base_bytes: int
    kv_floor_bytes: int
    kv_context_bytes: int
    kv_want_bytes: int
    num_others: int = 0
    workspace_bytes: int = 0
    max_parts: int = 1
    kv_copies: tuple[int, ...] = ()
    waited_s: float = 0.0
    batch: bool = False
    replica: bool = False
    group: str = ""
    load_s: float = 1.0
    uses_per_s: float = 0.0
    sleep_bytes: int | None = None
    quantized_bytes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Rules:
    """What operators may turn.

    Attributes:
        min_residency_s: a model that was just brought up is not sent away sooner, while others wait less than
            `max_wait_s`.
        max_wait_s: whoever has waited so long gets its turn: a busy model that keeps it out is closed to new requests
            and goes once the running ones have ended.
    """

    min_residency_s: float = 5.0
    max_wait_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Place the model here, after the named holders have given way.

    A holder in `sleep` or `evict` that is busy is closed to new requests first and goes when its running ones have
    ended; nothing that runs is ever cut off.

    Attributes:
        parts: where and how much; one part unless the model is split.
        kv_cache_bytes: what the KV cache may grow to, on all parts together.
        wake: the sleeping holder of this model that is to be woken rather than loaded anew.
        take_over: the sleeping holder of this model, on another device of the same node, whose weights are taken from
            its host memory rather than read from disk; it goes once they have been.
        sleep: holders that go to host memory.
        evict: holders that go for good, sleeping ones that must leave host memory included.
        shrink: holders whose KV cache gives up room, and by how many bytes.
        expected_s: time until ready, as far as known.
        reason: why here and why those, in words.
    """

    model: str
    parts: tuple[Part, ...]
    kv_cache_bytes: int
    reason: str
    wake: str = ""
    take_over: str = ""
    sleep: tuple[str, ...] = ()
    evict: tuple[str, ...] = ()
    shrink: tuple[tuple[str, int], ...] = ()
    expected_s: float = 0.0

    @property
    def needed_bytes(self) -> int:
        """What is reserved on all parts together."""
        return sum(part.num_bytes for part in self.parts)


class Obstacle(Enum):
    """Why there is no plan: for good, until somebody unpins, until somebody becomes idle, or for some seconds yet."""

    NEVER = "never"
    PINNED = "pinned"
    BUSY = "busy"
    SOON = "soon"


@dataclass(frozen=True, slots=True)
class Refusal:
    """No plan now.

    Attributes:
        needed_bytes: the least that would do.
        lacking_bytes: what is missing of it on the device that comes nearest.
        device: that device; empty when there is none.
        advice: what would help, in words, most useful first; for `NEVER` and `PINNED`.
        retry_in_s: when to ask again at the latest, for `SOON`; otherwise whenever something changes.
    """

    obstacle: Obstacle
    needed_bytes: int
    lacking_bytes: int
    reason: str
    device: str = ""
    advice: tuple[str, ...] = ()
    retry_in_s: float = 0.0


def in_words(num_bytes: int) -> str:
    """Return a size for people, e.g. "1.5 GiB"."""
    amount = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(amount) < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"
