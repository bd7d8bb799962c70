"""Runs steps one after the other, each in a process of its own: none can take the run, or the card, down with it.

Above: the entry. Below: the steps, started as `python -m tests.bench.gpu --child NAME`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from .found import Failed, NotRun, Outcome, Setting, Step, found_from, say
from .needs import missing

ROOT = Path(__file__).parent.parent.parent.parent
_LAST_LINES = 25
_LAST_CHARACTERS = 400

Execute = Callable[[Step, Setting], Outcome]


def run_steps(
    steps: Sequence[Step],
    setting: Setting,
    execute: Execute,
    within_s: float = float("inf"),
    after: Callable[[Sequence[Outcome]], None] = lambda _: None,
) -> list[Outcome]:
    """Run every step, whatever becomes of those before it; each is given the figures found so far.

    Args:
        within_s: of the whole run; a step is ended when the time is up, and those behind it do not begin.
        after: called after each step with all outcomes so far.
    """
    outcomes: list[Outcome] = []
    figures = dict(setting.figures)
    ends_s = time.monotonic() + within_s
    for step in steps:
        began_s = time.monotonic()
        left_s = ends_s - began_s
        say(f"{step.name}: begins")
        if lacking := missing(step.needs):
            outcome = Outcome(step.name, "failed", f"packages are missing: {', '.join(lacking)}")
        elif left_s <= 0:
            outcome = Outcome(step.name, "failed", f"the {within_s / 60:g} minutes of this run were over")
        else:
            bounded = replace(step, within_s=min(step.within_s, left_s))
            outcome = execute(bounded, replace(setting, figures=dict(figures)))
        outcome = replace(outcome, seconds=time.monotonic() - began_s)
        figures.update(outcome.found.figures)
        say(f"{step.name}: {outcome.status} after {outcome.seconds:.0f} s{': ' if outcome.why else ''}{outcome.why}")
        outcomes.append(outcome)
        after(outcomes)
    return outcomes


def in_process(step: Step, setting: Setting) -> Outcome:
    """Run one step here, and turn however it ends into its outcome."""
    try:
        return Outcome(step.name, "passed", found=step.run(setting))
    except NotRun as reason:
        return Outcome(step.name, "not run", str(reason))
    except Failed as reason:
        # What it found before is not told: a figure of an engine that errs is none.
        return Outcome(step.name, "failed", str(reason))
    except Exception as error:  # anything: the other steps must still run
        traceback.print_exc()
        return Outcome(step.name, "failed", f"{type(error).__name__}: {error}"[:_LAST_CHARACTERS])


def environment() -> dict[str, str]:
    """Return this process's environment, in which Python finds our packages whether or not they are installed."""
    path = [str(ROOT), str(ROOT / "proto"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def in_child(step: Step, setting: Setting, logs: Path | None = None) -> Outcome:
    """Run one step in a process of its own; it is ended, with all that it started, after `step.within_s`.

    Args:
        logs: a folder that keeps what each step's process said, however it ended.
    """
    with tempfile.TemporaryDirectory(prefix="hostler-gpu-") as directory:
        asked, told, log = Path(directory) / "asked.json", Path(directory) / "told.json", Path(directory) / "log"
        asked.write_text(json.dumps(setting.as_json()), encoding="utf-8")
        command = [sys.executable, "-m", "tests.bench.gpu", "--child", step.name, "--asked", asked, "--told", told]
        with log.open("wb") as errors:
            child = subprocess.Popen(
                [str(part) for part in command], cwd=ROOT, env=environment(), stderr=errors, start_new_session=True
            )
            try:
                status: int | None = child.wait(step.within_s)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _end(child)
        if told.is_file():
            document = json.loads(told.read_text(encoding="utf-8"))
            outcome = Outcome(step.name, document["status"], document["why"], found=found_from(document["found"]))
        elif status is None:
            outcome = Outcome(step.name, "failed", f"it took longer than {step.within_s:.0f} s and was ended")
        elif status < 0:
            outcome = Outcome(step.name, "failed", f"its process was ended by {signal.Signals(-status).name}")
        else:
            outcome = Outcome(step.name, "failed", f"its process ended with status {status}")
        if logs is not None:
            logs.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(log, logs / f"{step.name}.log")
        if outcome.status == "failed":
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(f"      {line}" for line in lines[-_LAST_LINES:]), flush=True)
        return outcome


def _end(child: subprocess.Popen[bytes]) -> None:
    """End what is left of a step's processes, which are a session of their own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def answer(step: Step, asked: Path, told: Path) -> int:
    """Be the child: run the step that was asked for, and tell how it ended."""
    setting = Setting(**json.loads(asked.read_text(encoding="utf-8")))
    outcome = in_process(step, setting)
    document = {"status": outcome.status, "why": outcome.why, "found": asdict(outcome.found)}
    partial = told.with_suffix(".partial")
    partial.write_text(json.dumps(document), encoding="utf-8")
    partial.rename(told)
    sys.stdout.flush()
    return 0
