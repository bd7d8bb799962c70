"""The store's command line: `python -m orchestrator.store pull|list|remove|verify`.

Above it: `hostler pull`, `hostler models`, `hostler serve`, and people. Below it: `pull`, `publish`, `layout`.
With `--json`, stdout carries one JSON object a line (`list`: one array) and nothing else.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostler.errors import HostlerError

from orchestrator.store.layout import StoredModel, list_stored
from orchestrator.store.progress import Progress
from orchestrator.store.publish import remove, verify
from orchestrator.store.pull import Options, pull

_SHORTEST_GAP_S = 0.1
_INTERRUPTED = 130


class Output:
    """Writes events to stdout, as JSON lines or as text; at most ten progress lines a second."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._last: Progress | None = None
        self._last_s = 0.0
        self._width = 0

    def progress(self, event: Progress) -> None:
        """Show how far a stage is."""
        now = time.monotonic()
        same = self._last is not None and (self._last.stage, self._last.detail) == (event.stage, event.detail)
        if same and event.done_bytes < event.total_bytes and now - self._last_s < _SHORTEST_GAP_S:
            return
        if event == self._last:
            return
        self._last, self._last_s = event, now
        if self._as_json:
            values = {"done_bytes": event.done_bytes, "total_bytes": event.total_bytes, "detail": event.detail}
            self.line({"stage": event.stage, **values})
            return
        share = f" {event.done_bytes * 100 // event.total_bytes:3d}%" if event.total_bytes else ""
        text = f"{event.stage}{share}  {event.detail}"
        if sys.stdout.isatty():
            sys.stdout.write("\r" + text.ljust(self._width))
            self._width = len(text)
        elif not same:
            sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def line(self, event: Any, text: str = "") -> None:
        """Write one JSON line, or `text`."""
        if not self._as_json and self._width:
            sys.stdout.write("\n")
            self._width = 0
        sys.stdout.write((json.dumps(event) if self._as_json else text) + "\n")
        sys.stdout.flush()


def _as_dict(model: StoredModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "path": str(model.path),
        "source": model.source,
        "revision": model.revision,
        "bytes": model.weight_bytes,
        "created_unix_s": model.created_unix_s,
    }


def _list(options: argparse.Namespace, output: Output) -> None:
    models = list_stored(options.models_dir)
    lines = [f"{model.name}  {model.weight_bytes / 1e6:.0f} MB  {model.source}" for model in models]
    output.line([_as_dict(model) for model in models], "\n".join(lines) or "No models are stored.")


def _one(options: argparse.Namespace, output: Output, act: Callable[[], StoredModel], verb: str) -> None:
    model = act()
    event = {"stage": "done", "path": str(model.path), "name": model.name}
    output.line(event, f"{verb} {model.name}" + ("" if verb == "removed" else f"  {model.path}"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.store", description="Models on this disk.")
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--models-dir", type=Path, help="default: $HOSTLER_MODELS_DIR or ~/.cache/hostler/models")
    shared.add_argument("--json", action="store_true", help="one JSON object a line")
    pulling = commands.add_parser("pull", parents=[shared], help="bring a model onto this disk")
    pulling.add_argument("name", help="catalog name, Hub id (org/name), directory, .gguf or .onnx file")
    pulling.add_argument("--revision", help="branch, tag or commit on the Hub")
    pulling.add_argument("--trust-remote-code", action="store_true", help="accept models that bring Python code")
    commands.add_parser("list", parents=[shared], help="show the models on this disk")
    for command, text in (("remove", "take a model off this disk"), ("verify", "hash a model's files again")):
        commands.add_parser(command, parents=[shared], help=text).add_argument("name")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status (0, 1 for a failure, 130 for Ctrl-C)."""
    options = _parser().parse_args(argv)
    output = Output(options.json)
    name: str = getattr(options, "name", "")
    root: Path | None = options.models_dir
    try:
        if options.command == "list":
            _list(options, output)
        elif options.command == "pull":
            how = Options(root, trust_remote_code=options.trust_remote_code, report=output.progress)
            _one(options, output, lambda: pull(name, options.revision, how), "stored")
        elif options.command == "remove":
            _one(options, output, lambda: remove(name, root), "removed")
        else:
            _one(options, output, lambda: verify(name, root, output.progress), "verified")
    except HostlerError as error:
        event = {"stage": "error", "reason": error.reason, "message": error.message}
        output.line(event, f"error: {error.message}")
        return 1
    except KeyboardInterrupt:
        output.line(
            {"stage": "error", "reason": "cancelled", "message": "Interrupted; pull again to go on."}, "stopped"
        )
        return _INTERRUPTED
    return 0


if __name__ == "__main__":
    # Stopped by a supervisor or by Ctrl-C: either way our children end and our scratch files go.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
