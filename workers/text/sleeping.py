"""What a text engine keeps while it sleeps, and how its model comes back.

Above: the engine. Below: directory, runners. On a CPU the weights lie in their files, which the system caches; they
are laid out anew from there. On a GPU they go to pinned host memory and come back as they were, or are taken over by a
worker on another device. Tokenizer, template, formats and compiled grammars never leave the process: they are the
engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hostler.errors import ModelLoadFailed

from workers.engine import LoadSpec
from workers.text.directory import Directory, LoadedModel
from workers.text.runner import Movable, Runner

if TYPE_CHECKING:
    from workers.text.engine import TextEngine


@dataclass(frozen=True, slots=True)
class Opened:
    """A model that can serve.

    Attributes:
        improve: work beside the serving engine that brings it a better runner; None when this is the best.
    """

    loaded: LoadedModel
    runner: Runner
    improve: Callable[[TextEngine], Coroutine[Any, Any, None]] | None = None


class Bed:
    """Where one engine's model lies while the engine sleeps. Methods are blocking, and called one at a time.

    Args:
        directory: of the model, as it was read when it was loaded.
        spec: what it was loaded with.
        open_model: opens it from there.
    """

    def __init__(
        self, directory: Directory, spec: LoadSpec, open_model: Callable[[Directory, LoadSpec], Opened]
    ) -> None:
        self._directory = directory
        self._open_model = open_model
        self._files = (directory.path, *(Path(adapter.path) for adapter in spec.adapters))
        self._stamp = _stamp(self._files)
        self._parked: tuple[LoadedModel, Movable] | None = None

    def lay_down(self, loaded: LoadedModel, runner: Runner) -> str:
        """Free what the model holds on its device; return what `Sleeper.sleep` does.

        Nobody may use `loaded` and `runner` any more.
        """
        if loaded.vision is not None:
            loaded.vision.forget()
        if loaded.device.type == "cuda" and isinstance(runner, Movable):
            self._parked = loaded, runner
            return runner.move_to_host(loaded.facts)
        runner.close()
        return ""

    def get_up(self, spec: LoadSpec) -> Opened:
        """Bring the model to the devices of `spec`, with a cache of its size.

        Raises:
            ModelLoadFailed: its files are not those that it was loaded from, or the cache is too small for it.
        """
        directory = self._directory.at(spec)
        if self._parked is not None and directory.device.type == "cuda":
            loaded, runner = self._parked
            loaded = loaded.at(directory)
            runner.move_to_device(loaded.kv, loaded.device)
            self._parked = None
            return Opened(loaded, runner)
        self._parked = None
        if _stamp(self._files) != self._stamp:
            raise ModelLoadFailed(f"The files of {spec.model} changed while it slept. Load it again.")
        return self._open_model(directory, spec)


def _stamp(directories: tuple[Path, ...]) -> list[tuple[str, int, int]]:
    """Return names, sizes and times of all files."""
    files = [file for directory in directories if directory.is_dir() for file in directory.iterdir() if file.is_file()]
    return sorted((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
