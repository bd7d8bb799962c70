"""`make gpu`: is hostler right on this CUDA device, and how fast? One table; elsewhere a notice and success.

    python -m tests.bench.gpu [--only STEP …] [--write FILE] [--layers N] [--folder DIRECTORY]

Above: the Makefile. Below: the steps, each in a process of its own. Nothing heavy is imported before it is known to be
there.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from .found import Outcome, Setting
from .needs import ENGINE, missing
from .running import ROOT, answer, in_child, in_process, run_steps
from .steps import STEPS

NO_DEVICE = "This machine has no CUDA device that torch can use: nothing was tested or measured on one."


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line asks for."""
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.gpu", description="Correctness and speed on one CUDA device."
    )
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", help=f"of {', '.join(names)}")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write everything as JSON, too")
    parser.add_argument(
        "--minutes", type=float, default=9, help="for the whole run; what is left then fails (default 9)"
    )
    parser.add_argument("--layers", type=int, default=0, metavar="N", help="cut the measured model to N layers")
    parser.add_argument("--folder", type=Path, help="build models there and leave them (default: a temporary folder)")
    parser.add_argument("--device", default="cuda:0", help="default cuda:0; cpu only tests the benchmark itself")
    parser.add_argument("--small", action="store_true", help="tiny sizes: a test of the benchmark itself")
    parser.add_argument("--in-process", action="store_true", help="run the steps here, for a debugger")
    parser.add_argument("--child", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--asked", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--told", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; return the exit status: 1 when packages are missing or a step failed."""
    chosen = parse(arguments)
    by_name = {step.name: step for step in STEPS}
    sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "proto")) if path not in sys.path]
    if chosen.child:
        from hostler import logs as said

        said.configure()  # the engine says there why it does without kernels or recordings
        return answer(by_name[chosen.child], chosen.asked, chosen.told)
    if lacking := missing(ENGINE):
        print(f"{sys.executable} lacks packages that hostler's engine needs: {', '.join(lacking)}.")
        print("Install them for it, put them on PYTHONPATH, or run `make gpu` without PYTHON to set up .venv.")
        return 1
    if chosen.device.startswith("cuda") and not _has_cuda():
        print(NO_DEVICE)
        return 0
    steps = [step for step in STEPS if not chosen.only or step.name in chosen.only]
    folder: AbstractContextManager[str | Path] = nullcontext(chosen.folder)
    if chosen.folder is None:
        folder = tempfile.TemporaryDirectory(prefix="hostler-gpu-models-")
    else:
        chosen.folder.mkdir(parents=True, exist_ok=True)
    if chosen.write:
        chosen.write.parent.mkdir(parents=True, exist_ok=True)
    from . import table

    def keep(outcomes: Sequence[Outcome]) -> None:
        if chosen.write:
            table.write(outcomes, chosen.write)

    with folder as path:
        setting = Setting(chosen.device, chosen.small, chosen.layers, str(Path(path).resolve()))
        logs = chosen.write.with_suffix(".logs") if chosen.write else None
        execute = in_process if chosen.in_process else partial(in_child, logs=logs)
        outcomes = run_steps(steps, setting, execute, chosen.minutes * 60, keep)
    table.show(outcomes, table.console())
    if chosen.write:
        print(f"  written to {chosen.write}")
    return int(any(outcome.status == "failed" for outcome in outcomes))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A child has told what it found; threads and libraries that would take their time to end are not waited for.
    os._exit(status) if "--child" in sys.argv else sys.exit(status)
