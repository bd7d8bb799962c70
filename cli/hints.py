"""What to do next when a model cannot be had: a sentence more on the orchestrator's refusal.

Above stand `cli.seeing` and `cli.control`; below, the run directory's configuration, for the names that there are.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hostler import errors

from cli import servers


def next_step(error: errors.HostlerError, model: str, known: Sequence[str]) -> str:
    """Return a sentence to go with a refusal; empty when it says all there is to say."""
    if isinstance(error, errors.ModelNotFound):
        folded = {name.casefold(): name for name in known}
        near = difflib.get_close_matches(model.casefold(), folded, n=1, cutoff=0.5)
        meant = f"Did you mean '{folded[near[0]]}'? " if near else ""
        return f"{meant}`hostler models` lists those that there are."
    if isinstance(error, errors.ModelNeverFits):
        return f"`hostler plan {model}` says what would help."
    if isinstance(error, errors.ModelLoadFailed):
        return "`hostler events` shows what went before."
    return ""


@contextmanager
def hinted(server: servers.Server, model: str) -> Iterator[None]:
    """Let refusals of what is done for `model` leave with a sentence on what to do next."""
    try:
        yield
    except errors.HostlerError as error:
        step = next_step(error, model, servers.names_of(server.run_dir))
        if not step or step in error.message:
            raise
        message = error.message.rstrip(".")
        raise type(error)(f"{message}. {step}", param=error.param, retry_after_s=error.retry_after_s) from None
