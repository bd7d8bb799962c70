"""Proves the kernels on a model in a process of its own, which leaves a recipe and nothing else.

    python -m workers.text.proving --parent PID   (a LoadSpec as JSON on stdin)

Above: `opening.py`. Below: `native/recipe.py`, by way of `opening.prove`. A proof takes transformers' definition of the
model (50 MB of imports, which a worker would keep for life) with its first layers, one of every kind. Here all that
ends with the process, and so does a crash of unproved kernels. Where no recipe can be written a mark says so, and
nobody tries again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from hostler import logs

from workers.child import die_with, fields_of, spec_of
from workers.engine import LoadSpec

log = logging.getLogger(__name__)

_DEFINITIONS = "transformers.modeling_utils"
_EXPENDABLE = "1000"  # where memory runs out, the system should end this process rather than the worker


def is_worth_it(recipe: Path) -> bool:
    """Return whether this process still is without transformers' definitions, and nobody failed to write the recipe."""
    return _DEFINITIONS not in sys.modules and not _mark(recipe).exists()


def prove_apart(spec: LoadSpec) -> bool:
    """Have the kernels proved and the recipe written. Blocking: seconds. Ends when the calling thread does.

    Returns:
        Whether there is a recipe now; the reason why not is in the log.
    """
    command = [sys.executable, "-P", "-m", "workers.text.proving", "--parent", str(os.getpid())]
    try:
        done = subprocess.run(command, input=json.dumps(fields_of(spec)), text=True, check=False, process_group=0)
    except OSError as error:
        log.warning("proof not started", extra={"model": spec.model, "reason": str(error)})
        return False
    return done.returncode == 0


def prove(spec: LoadSpec) -> bool:
    """Load the first layers through transformers, prove the kernels on them, write the recipe, or the mark for none.

    Raises:
        ModelLoadFailed: the model cannot be loaded.
    """
    from workers.text import opening
    from workers.text.describe import NotSupported, describe, first_of_each_kind
    from workers.text.directory import read_directory
    from workers.text.loader import load
    from workers.text.native.build import built

    directory = read_directory(spec)
    if (library := built()) is None:
        return False
    path = opening.recipe_of(library, directory, spec)
    first = directory.first_layers(first_of_each_kind(directory.text))
    reason = "its weights are not in its files as they are used"
    try:
        loaded = load(replace(spec, adapters=()), lambda *_: None, first)
        opening.prove(directory, loaded, spec, library, describe(loaded.decoder, loaded.head, loaded.text_config))
    except NotSupported as error:
        reason = str(error)
    if path.exists():
        return True
    log.info("no recipe for this model", extra={"model": spec.model, "reason": reason})
    _mark(path).write_text(reason + "\n", encoding="utf-8")
    return False


def _mark(recipe: Path) -> Path:
    return recipe.with_name(recipe.name + ".none")


def main() -> None:
    """Prove, and tell by the exit status."""
    parser = argparse.ArgumentParser(prog="python -m workers.text.proving", description=__doc__)
    parser.add_argument("--parent", type=int, required=True, help="process id of the worker")
    die_with(parser.parse_args().parent)
    logs.configure()
    # transformers would list the weights of all layers that the proof does without.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_EXPENDABLE, encoding="ascii")
    status = 1
    try:
        status = 0 if prove(spec_of(json.load(sys.stdin))) else 1
    except Exception as error:  # the worker tries by itself, and tells whoever waits
        log.warning("proof failed", extra={"reason": str(error)})
    finally:
        logging.shutdown()
        os._exit(status)  # without freeing every weight first


if __name__ == "__main__":
    main()
