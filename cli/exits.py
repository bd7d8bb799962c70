"""How a command ends: one friendly line instead of a traceback. Every command in `cli.main` is wrapped in it.

Exit codes: 0 done, 1 it failed, 2 the command line or the configuration is wrong, 130 interrupted.
`HOSTLER_DEBUG=1` shows the traceback.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class CliError(Exception):
    """Something to tell the user in one line (or a few, each a fault). Exits with `exit_code`."""

    exit_code = 1


class UsageError(CliError):
    """The command line or the configuration is wrong."""

    exit_code = 2


def friendly(command: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command: named failures become lines on standard error."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        import typer

        if os.environ.get("HOSTLER_DEBUG") == "1":
            return command(*args, **kwargs)
        try:
            return command(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader of our output has gone (`hostler ps | head -1`); Python would complain once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except Exception as error:
            exit_code, lines = explain(error)
            for line in lines:
                typer.echo(f"hostler: {line}", err=True)
            raise typer.Exit(exit_code) from None

    return wrapped


def explain(error: Exception) -> tuple[int, list[str]]:
    """Return the exit code and the lines for a failure."""
    if isinstance(error, CliError):
        return error.exit_code, str(error).splitlines()
    # What was raised comes from a loaded module: asking only the loaded ones keeps `--help` free of pydantic and grpc.
    config, errors = sys.modules.get("hostler.config"), sys.modules.get("hostler.errors")
    if config is not None and isinstance(error, config.ConfigError):
        return 2, [line.replace("Value error, ", "") for line in str(error).splitlines()]
    if errors is not None and isinstance(error, errors.HostlerError):
        return 1, [" ".join(error.message.split())]
    if isinstance(error, OSError):
        return 1, [str(error)]
    return 1, [f"internal error: {type(error).__name__}: {error}. HOSTLER_DEBUG=1 shows where."]
