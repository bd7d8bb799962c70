"""The model stores of all machines as one: look here first, then elsewhere; bring files to where they are needed.

Above it: `effects_ray.py`. Below it: `store_client.py` for this machine, `elsewhere.py` for the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable

from hostler.errors import ModelLoadFailed, WorkerLost

from orchestrator.effects import Report
from orchestrator.elsewhere import Elsewhere
from orchestrator.models import Located, ModelSpec
from orchestrator.state import Progress
from orchestrator.store_client import StoreClient


class Stores:
    """Every machine has a store of its own, or some share one through their file system: it is the same here."""

    def __init__(self, here: StoreClient, elsewhere: Elsewhere) -> None:
        self._here = here
        self._elsewhere = elsewhere

    async def list_stored(self) -> tuple[ModelSpec, ...]:
        """Return every model in this machine's store."""
        return await self._here.list_stored()

    async def locate(self, spec: ModelSpec) -> Located | None:
        """Return the model's files and footprint if they are here, else if they are on another machine.

        Raises:
            HostlerError: the source means nothing, or its files are damaged.
        """
        if (found := await self._here.locate(spec)) is not None:
            return found
        for member in self._elsewhere.members:
            with contextlib.suppress(WorkerLost):
                if (found := await self._elsewhere.locate(spec, member.name)) is not None:
                    return found
        return None

    async def fetch(self, spec: ModelSpec, report: Report) -> None:
        """Pull the model to this machine."""
        await self._here.fetch(spec, report)

    async def bring(self, spec: ModelSpec, node: str, report: Report) -> Located:
        """Return the model's files on one machine (empty: this one), fetching them there if need be.

        Raises:
            HostlerError: they cannot be had there.
        """
        if (found := await self._locate_on(node, spec)) is not None:
            return found
        where = f" on {node}" if node else ""
        if not spec.configured:
            raise ModelLoadFailed(f"The files of {spec.name} are not in the store{where}.")
        report(Progress("download", f"fetching {spec.source}{where}"))
        await (self._elsewhere.fetch(spec, node, report) if node else self._here.fetch(spec, report))
        if (found := await self._locate_on(node, spec)) is None:
            raise ModelLoadFailed(f"The files of {spec.name} are not in the store{where} even after a download.")
        return found

    def _locate_on(self, node: str, spec: ModelSpec) -> Awaitable[Located | None]:
        return self._elsewhere.locate(spec, node) if node else self._here.locate(spec)
