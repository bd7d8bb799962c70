"""The machines of the cluster as plain data: their names, what was found on them, and what changed. Pure.

Above it: `ray_nodes.py`, which asks Ray and the machines, and whoever takes in what it reports. Below it: `devices.py`.
This machine's name is empty everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from orchestrator.devices import Device


@dataclass(frozen=True, slots=True)
class Machine:
    """One living node as Ray lists it.

    Attributes:
        ray_id: Ray's name of this life of it; a node that comes back has another.
        given_name: what `ray start --node-name` was told; empty when it was told nothing.
        address: its IP address within the cluster, where its workers listen.
        port: of its raylet.
    """

    ray_id: str
    given_name: str
    hostname: str
    address: str
    port: int


@dataclass(frozen=True, slots=True)
class Member:
    """A machine that workers may be placed on, with what was found there."""

    name: str
    machine: Machine
    devices: tuple[Device, ...]
    sleep_budget_bytes: int


@dataclass(frozen=True, slots=True)
class NodesSeen:
    """What other machines offer now, all of it, and what changed since the last time.

    Attributes:
        devices: of all of them together; this machine's are not among them.
        sleep_budget_bytes: host memory for sleeping models on each.
        joined, left: names of machines.
        why: in words, for people; empty when nothing changed.
    """

    devices: tuple[Device, ...] = ()
    sleep_budget_bytes: dict[str, int] = field(default_factory=dict)
    joined: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True, slots=True)
class RemoteWorker:
    """How a worker on another machine is reached and ended.

    Attributes:
        address: its gRPC target.
        start_ticks: with the pid, which process is meant; 0 while that is not known.
    """

    node: str
    address: str = ""
    pid: int = 0
    start_ticks: int = 0


def machine_of(row: Mapping[str, object]) -> Machine:
    """Return a machine from one entry of `ray.nodes()`."""
    address, given = str(row["NodeManagerAddress"]), str(row.get("NodeName") or "")
    return Machine(
        ray_id=str(row["NodeID"]),
        given_name="" if given == address else given,  # Without a name Ray takes the address for one.
        hostname=str(row.get("NodeManagerHostname") or ""),
        address=address,
        port=int(str(row["NodeManagerPort"])),
    )


def name_for(machine: Machine, taken: Iterable[str]) -> str:
    """Return what a machine is called: as it was named, else its host's name, with its address where that is taken."""
    wanted = machine.given_name or machine.hostname.partition(".")[0]
    name = re.sub(r"[^a-z0-9._-]+", "-", wanted.lower()).strip("-._")
    address = re.sub(r"[^a-z0-9.]+", "-", machine.address.lower()).strip("-.")
    if not name:
        return address
    return f"{name}-{address}" if name in set(taken) else name


def host_port(address: str, port: int) -> str:
    """Return an address to listen on or to call, with brackets around IPv6."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def seen(members: Iterable[Member], joined: Iterable[Member], left: Mapping[str, str]) -> NodesSeen:
    """Return the report on `members`, of whom some just joined; `left` maps the names of those who went to why."""
    members, joined = tuple(members), tuple(joined)
    words = [f"{m.name} joined with {', '.join(d.local_id for d in m.devices)}" for m in joined]
    words += [f"{name} is gone: {why}" for name, why in left.items()]
    return NodesSeen(
        devices=tuple(device for member in members for device in member.devices),
        sleep_budget_bytes={member.name: member.sleep_budget_bytes for member in members},
        joined=tuple(member.name for member in joined),
        left=tuple(left),
        why="; ".join(words),
    )
