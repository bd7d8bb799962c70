"""Which models could not be loaded as they are configured, as far as the files that are here tell.

Above stand the start's screen and `cli.reloading`; below, `cli.placement`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hostler import errors

from cli import placement

if TYPE_CHECKING:
    from hostler.config import ModelConfig
    from hostler.rundir import RunDir


async def hopeless(run_dir: RunDir, models: Iterable[ModelConfig]) -> dict[str, errors.HostlerError]:
    """Return by name why models will not load; nothing of those that will, or where the orchestrator is away."""
    found: dict[str, errors.HostlerError] = {}
    async with placement.connect(run_dir) as client:
        for model in models:
            try:
                await client.plan(model.name)
            except errors.OrchestratorAway:
                break
            except errors.HostlerError as error:
                found[model.name] = error
    return found


def in_words(name: str, error: errors.HostlerError) -> str:
    """Return one line for the screen."""
    return f"{name} will not load: {' '.join(error.message.split())}"
