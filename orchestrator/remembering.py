"""What must outlive the orchestrator, as files: placements of this run, and what loads of any run have taught.

Above it: `effects_ray.py`. Below it: the run directory, the models directory. What cannot be read or written is logged,
and never fails what it was for: workers are then adopted by their own word, and loads are measured again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orchestrator import ray_session
from orchestrator.effects import Memory, Placement
from orchestrator.experience import Experience
from orchestrator.nodes import RemoteWorker
from orchestrator.process_id import ProcessId

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recalled:
    """What `placements.json` held: the scheduler's memory, and by worker id the processes, here and elsewhere."""

    memory: Memory = field(default_factory=Memory)
    processes: dict[str, ProcessId] = field(default_factory=dict)
    remote: dict[str, RemoteWorker] = field(default_factory=dict)


class PlacementsFile:
    """`placements.json` in the run directory."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "placements.json"

    def read(self) -> Recalled:
        """Return what was written last; nothing if there is no such file, or not one of ours."""
        try:
            values = json.loads(self._path.read_text(encoding="utf-8"))
            return Recalled(
                Memory(int(values["generation"]), tuple(_placement(p) for p in values["placements"])),
                {i: ProcessId(int(pid), int(start_ticks)) for i, (pid, start_ticks) in values["processes"].items()},
                {i: RemoteWorker(**there) for i, there in values.get("remote", {}).items()},
            )
        except FileNotFoundError:
            return Recalled()
        except (OSError, ValueError, KeyError, TypeError):
            log.exception("placements.json cannot be read; workers will be adopted by their own word")
            return Recalled()

    def write(self, memory: Memory, processes: Mapping[str, ProcessId], remote: Mapping[str, RemoteWorker]) -> None:
        """Replace the file."""
        values = asdict(memory) | {
            "processes": {worker_id: (p.pid, p.start_ticks) for worker_id, p in processes.items()},
            "remote": {worker_id: asdict(there) for worker_id, there in remote.items()},
        }
        ray_session.write_private(self._path, json.dumps(values))


class ExperienceFile:
    """`experience.json` beside the models, shared by all runs."""

    def __init__(self, models_dir: Path | None) -> None:
        self._models_dir = models_dir

    @property
    def _path(self) -> Path:
        from orchestrator.store import resolve_models_dir

        return resolve_models_dir(self._models_dir) / "experience.json"

    def read(self) -> Experience:
        """Return what earlier loads have taught; nothing if there is no such file, or not one of ours."""
        try:
            return Experience.from_json(json.loads(self._path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return Experience()
        except (OSError, ValueError, AttributeError):
            log.exception("what earlier loads have taught cannot be read; it will be learned again")
            return Experience()

    def write(self, experience: Experience) -> None:
        """Replace the file."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            ray_session.write_private(self._path, json.dumps(experience.as_json(), indent=1))
        except OSError as error:
            log.warning("what loads have taught could not be stored", extra={"error": error.strerror})


def _placement(values: dict[str, Any]) -> Placement:
    parts = tuple((str(device), int(num_bytes)) for device, num_bytes in values["parts"])
    return Placement(**(values | {"parts": parts}))
