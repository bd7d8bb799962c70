"""The scheduler's view of the model store: look-ups in a thread, downloads in a process of their own.

Above it: `effects_ray.py`. Below it: `orchestrator.store`, imported at the first look-up to keep the start short.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from hostler.errors import BY_REASON, Internal, ModelLoadFailed
from hostler.lifecycle.v1 import lifecycle_pb2

from orchestrator.effects import Report
from orchestrator.models import ENGINES, Footprint, Located, ModelSpec, Split, check_options
from orchestrator.ray_session import TOKEN_VARIABLE
from orchestrator.state import Progress

log = logging.getLogger(__name__)

_LINE_LIMIT_BYTES = 1 << 20


class StoreClient:
    """Asks the store of one models directory."""

    def __init__(self, models_dir: Path | None) -> None:
        self._models_dir = models_dir

    async def list_stored(self) -> tuple[ModelSpec, ...]:
        """Return every model in the store, to be served under its stored name."""
        return await asyncio.to_thread(self._list_stored)

    def _list_stored(self) -> tuple[ModelSpec, ...]:
        from orchestrator.store import list_stored

        return tuple(
            ModelSpec(
                name=found.name,
                source=found.source,
                created_unix_s=int(found.created_unix_s),
                configured=False,
            )
            for found in list_stored(self._models_dir)
        )

    async def locate(self, spec: ModelSpec) -> Located | None:
        """Return a model's directory and footprint, if it is here.

        Raises:
            HostlerError: the source means nothing, its files are damaged, or they are for an engine that lacks an
                option of the spec.
        """
        return await asyncio.to_thread(self._locate, spec)

    def _locate(self, spec: ModelSpec) -> Located | None:
        from orchestrator.store import adapter_bytes, find, footprint, kind_of, list_stored, splitting

        if spec.configured:
            found = find(spec.source, self._models_dir, spec.revision)
        else:  # Seen in a listing: its name is what identifies it there.
            found = next((m for m in list_stored(self._models_dir) if m.name == spec.name), None)
        if found is None:
            return None
        engine = spec.engine or ENGINES[kind_of(found.path)]
        check_options(spec, engine)
        generates = engine == lifecycle_pb2.ENGINE_KIND_TEXT
        adapters_bytes = sum(adapter_bytes(name, Path(path)) for name, path in spec.adapters)

        def located(kind: str) -> Located:
            needs = footprint(found.path, spec.dtype, spec.quantize, generates=generates, beams=spec.beams, kind=kind)
            # For advice: what the weights would take in the ways that they are not served in.
            others = ("int8", "int4") if generates and not spec.quantize else ()
            quantized = ((other, footprint(found.path, spec.dtype, other, kind=kind).weight_bytes) for other in others)
            return Located(
                str(found.path),
                Footprint(
                    needs.weight_bytes + adapters_bytes,
                    needs.kv_bytes_per_token,
                    needs.max_context_tokens,
                    needs.workspace_bytes,
                ),
                engine,
                quantized=tuple((other, weights + adapters_bytes) for other, weights in quantized),
            )

        on_cpu, on_gpu = located("cpu"), located("cuda")
        return replace(
            on_cpu,
            on_gpu=None if on_gpu == on_cpu else on_gpu,
            splits=tuple(
                Split(kind, found_split.max_parts, found_split.kv_copies)
                for kind in ("cpu", "cuda")
                if generates
                and (found_split := splitting(found.path, kind, has_adapters=bool(spec.adapters))).max_parts > 1
            ),
        )

    async def fetch(self, spec: ModelSpec, report: Report) -> None:
        """Pull a model in a child process, which is killed when the wait is given up.

        Raises:
            HostlerError: as the child said.
        """
        command = [sys.executable, "-m", "orchestrator.store", "pull", spec.source, "--json"]
        if spec.revision:
            command += ["--revision", spec.revision]
        if spec.trust_remote_code:
            command.append("--trust-remote-code")
        if self._models_dir is not None:
            command += ["--models-dir", str(self._models_dir)]
        environment = {key: value for key, value in os.environ.items() if key != TOKEN_VARIABLE}
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
            limit=_LINE_LIMIT_BYTES,
        )
        try:
            done = process.stdout is not None and await self._relay(process.stdout, report)
            status = await process.wait()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if not done:
            raise ModelLoadFailed(f"the download of {spec.source} ended early (exit status {status}); see the log")

    async def _relay(self, stdout: asyncio.StreamReader, report: Report) -> bool:
        """Relay progress until the last line; return whether it said "done"."""
        async for line in stdout:
            event = _parse(line)
            stage = event.get("stage", "")
            if stage == "done":
                return True
            if stage == "error":
                kind = BY_REASON.get(str(event.get("reason")), Internal)
                raise kind(str(event.get("message") or "the download failed"))
            sizes = (int(event.get("done_bytes") or 0), int(event.get("total_bytes") or 0))
            report(Progress(str(stage), str(event.get("detail") or ""), *sizes))
        return False


def _parse(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        log.warning("the store wrote a line that is not JSON", extra={"num_bytes": len(line)})
        return {}
    return event if isinstance(event, dict) else {}
