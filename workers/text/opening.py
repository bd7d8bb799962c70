"""Opens a text engine: read the directory, choose a runner, warm up, start. All of it off the event loop.

On the CPU the compiled kernels run the model when they know its family. A model that they were proved on before goes
from its files straight to them (`native/recipe.py`); on a new one they are proved in a process of its own first
(`proving.py`). Any other is loaded through transformers' definition, whose import alone takes seconds. When the kernels
are not compiled yet, the engine serves through that definition at once, compiles in the background and goes over
between two steps; but quantized weights wait for them, some ten seconds once: the definition would hold more than was
reserved for them, run slower than without, and have nothing left to pack.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from workers import memory
from workers.engine import LoadSpec
from workers.gentle import gently, load_niceness
from workers.refusals import refuse_beams
from workers.text.adapters import read_adapters
from workers.text.describe import Description, NotSupported, describe, described_layers, first_of_each_kind
from workers.text.directory import Directory, LoadedModel, choose_dtype, read_directory
from workers.text.engine import TextEngine
from workers.text.kv_cache import KVShape, blocks_for
from workers.text.native import build, recipe
from workers.text.native.decoder import NativeDecoder
from workers.text.native.runner import PROBE_TOKENS, NativeRunner
from workers.text.proving import is_worth_it, prove_apart
from workers.text.runner import Runner
from workers.text.sleeping import Bed, Opened

log = logging.getLogger(__name__)

Report = Callable[[str, int, int], None]


async def open_text_engine(spec: LoadSpec, report: Report) -> TextEngine:
    """Load `spec` and return a serving engine.

    Raises:
        ModelLoadFailed: the directory cannot be served.
        UnsupportedParameter: an option that this engine does not have.
    """
    refuse_beams(spec, "text models")
    directory = await gently(partial(read_directory, spec))
    if spec.quantize and directory.compilable and not directory.kernels:
        report("compile", 0, 0)
        try:
            await gently(build.build)
            directory = directory.at(spec)
        except build.CannotBuild as reason:
            log.warning("serving without kernels", extra={"model": spec.model, "reason": str(reason)})
    opened = await gently(partial(open_model, directory, spec, report), load_niceness(len(spec.devices)))
    log.info("runner chosen", extra={"model": spec.model, "runner": opened.runner.name})
    report("warm-up", 0, 0)
    engine = TextEngine(opened.loaded, spec, opened.runner, Bed(directory, spec, open_model))
    await engine.settle(opened)
    return engine


def open_model(directory: Directory, spec: LoadSpec, report: Report = lambda *_: None) -> Opened:
    """Return the model with the best runner that can serve it now. Blocking.

    Raises:
        ModelLoadFailed: the directory cannot be served.
    """
    loaded, runner, may_compile = open_runner(directory, spec, report)
    improve = partial(_compile_and_adopt, directory=directory, loaded=loaded, spec=spec) if may_compile else None
    return Opened(loaded, runner, improve)


def open_runner(directory: Directory, spec: LoadSpec, report: Report) -> tuple[LoadedModel, Runner, bool]:
    """Return the model, the best runner that can serve it now, and whether compiling the kernels would give a better.

    The model comes back with the dtype that it is served in: one loaded for the kernels, but refused by them, goes over
    to float32 where torch has no fast bfloat16. Blocking.

    Raises:
        ModelLoadFailed: the directory cannot be served.
    """
    if len(spec.devices) > 1:
        from workers.text.parallel.opening import open_split

        return *open_split(spec, report), False
    if spec.shelf and (found := _open_shelved(directory, spec, report)) is not None:
        return *found, False
    library = build.built() if directory.kernels else None
    if library is not None:
        ready = open_recipe(directory, spec, library, report)
        if ready is None and is_worth_it(recipe_of(library, directory, spec)) and prove_apart(spec):
            ready = open_recipe(directory, spec, library, report)
        if ready is not None:
            return *ready, False
    from workers.text.eager import open_eager
    from workers.text.linear import quantize
    from workers.text.loader import load

    loaded = load(spec, report, directory)
    may_compile = False
    if loaded.device.type == "cpu":
        try:
            if (library := build.built()) is not None:
                runner = open_native(directory, loaded, spec, library)
                loaded.free_weights()
                memory.give_back()
                told = loaded.told(spec.quantize, runner.decoder.weight_bytes)
                return _lighter_next_time(told, directory, spec, library), runner, False
            describe(loaded.decoder, loaded.head, loaded.text_config)
            may_compile = not spec.quantize  # quantized weights replace the ones that the kernels would be packed from
        except NotSupported as reason:
            log.info("no kernels for this model", extra={"model": spec.model, "reason": str(reason)})
            if spec.dtype == "auto":
                loaded = loaded.with_dtype(choose_dtype("auto", loaded.dtype, loaded.device))
    if spec.quantize:
        saved_bytes = quantize(loaded.decoder, spec.quantize, loaded.device)
        loaded.model.to(loaded.device)
        loaded = loaded.told(spec.quantize, loaded.facts.weight_bytes - saved_bytes)
    eager = open_eager(loaded, spec, keep_weights=may_compile or bool(spec.quantize))
    if may_compile:
        loaded = replace(loaded, facts=replace(loaded.facts, loads_lighter=True))
    if not may_compile:
        for adapter in loaded.adapters:  # The runner has its own.
            adapter.release()
    return loaded, eager, may_compile


def _open_shelved(directory: Directory, spec: LoadSpec, report: Report) -> tuple[LoadedModel, Runner] | None:
    """Return the model that another worker has asleep, served as it was there; None if it cannot be taken over."""
    from workers.text.eager import open_eager
    from workers.text.loader import take_over

    loaded = take_over(spec, report, directory)
    return None if loaded is None else (loaded, open_eager(loaded, spec, keep_weights=True))


def _lighter_next_time(loaded: LoadedModel, directory: Directory, spec: LoadSpec, library: Path) -> LoadedModel:
    """Return the model with the fact that later loads go by a recipe, if one was written."""
    is_lighter = recipe_of(library, directory, spec).exists()
    return replace(loaded, facts=replace(loaded.facts, loads_lighter=is_lighter))


def recipe_of(library: Path, directory: Directory, spec: LoadSpec) -> Path:
    """Return where the recipe for this load is kept, written or not."""
    return recipe.recipe_path(library, directory, _weights(directory.dtype, directory.text.dtype, spec))


def open_recipe(
    directory: Directory, spec: LoadSpec, library: Path, report: Report
) -> tuple[LoadedModel, NativeRunner] | None:
    """Return a model that the kernels were proved on before, packed straight from its files; None if there is none."""
    weights = _weights(directory.dtype, directory.text.dtype, spec)
    found = recipe.read(recipe_of(library, directory, spec), directory)
    if found is None:
        return None
    total = sum(file.stat().st_size for file in directory.weight_files)
    report("read", 0, total)
    decoder = _pack(library, found.description, directory.dtype, directory.kv, weights, spec)
    report("read", total, total)
    loaded = directory.loaded(
        spec,
        architecture=found.architecture,
        num_parameters=found.num_parameters,
        weight_bytes=decoder.weight_bytes,
        adapters=read_adapters(spec.adapters, described_layers(found.description)),
    )
    for index, adapter in enumerate(loaded.adapters):
        decoder.add_adapter(index, adapter)
        adapter.release()
    decoder.rest()
    memory.trim()
    return loaded.told(spec.quantize, decoder.weight_bytes), NativeRunner(decoder, _num_threads(spec))


def open_native(directory: Directory, loaded: LoadedModel, spec: LoadSpec, library: Path) -> NativeRunner:
    """Prove the kernels on a loaded module and pack it for them.

    The module keeps its own weights: `LoadedModel.free_weights` frees them once nobody runs it.

    Raises:
        NotSupported: the kernels do not know this model, or disagree with transformers about it.
    """
    if loaded.vision is not None and loaded.vision.has_three_dimensions:
        raise NotSupported("positions in three dimensions")
    description = describe(loaded.decoder, loaded.head, loaded.text_config)
    prove(directory, loaded, spec, library, description)
    weights = _weights(loaded.dtype, loaded.text_config.dtype, spec)
    decoder = _pack(library, description, loaded.dtype, loaded.kv, weights, spec)
    for index, adapter in enumerate(loaded.adapters):
        decoder.add_adapter(index, adapter)
    decoder.rest()
    return NativeRunner(decoder, _num_threads(spec))


def prove(directory: Directory, loaded: LoadedModel, spec: LoadSpec, library: Path, description: Description) -> None:
    """Prove the kernels on a module's first layers, one of every kind, and write a recipe for the next load.

    All layers would take the memory of the whole model twice more, in float32 where torch has no fast bfloat16, and
    would say no more: the others compute alike.

    Args:
        directory: of the whole model.
        loaded: has at least those layers; `description` is its.

    Raises:
        NotSupported: the kernels disagree with transformers about this model.
    """
    from workers.text.eager import proved

    count = first_of_each_kind(directory.text)
    first = replace(description, layers=description.layers[:count])
    weights = _weights(loaded.dtype, loaded.text_config.dtype, spec)
    blocks = blocks_for(PROBE_TOKENS)
    kv = replace(loaded.kv, num_layers=count, num_blocks=blocks, capacity_blocks=blocks)
    runner = NativeRunner(_pack(library, first, loaded.dtype, kv, weights, spec), _num_threads(spec))
    # Towers are not in recipes.
    draft = recipe.draft(directory, first, loaded.model) if directory.config is directory.text else None
    routed = any(layer.router is not None for layer in first.layers)
    try:
        if not proved(runner, loaded, weights, num_layers=count, routed=routed):
            raise NotSupported("the kernels' logits differ from transformers'")
    finally:
        runner.close()
    if draft is not None:
        draft.write(recipe.recipe_path(library, directory, weights))


def _weights(dtype: torch.dtype, stored: torch.dtype | None, spec: LoadSpec) -> str:
    """How the kernels keep the weights. Those stored in bfloat16 lose nothing by staying so: sums are float32."""
    if spec.quantize:
        return spec.quantize
    return "bfloat16" if torch.bfloat16 in (dtype, stored) and spec.dtype != "float32" else "float32"


def _num_threads(spec: LoadSpec) -> int:
    return spec.num_threads or len(os.sched_getaffinity(0))


def _pack(
    library: Path, description: Description, dtype: torch.dtype, kv: KVShape, weights: str, spec: LoadSpec
) -> NativeDecoder:
    return NativeDecoder(
        library,
        description,
        weights=weights,
        cache="float32" if dtype == torch.float32 else "bfloat16",
        num_blocks=kv.num_blocks,
        capacity_blocks=kv.capacity_blocks,
        num_threads=_num_threads(spec),
    )


async def _compile_and_adopt(engine: TextEngine, directory: Directory, loaded: LoadedModel, spec: LoadSpec) -> None:
    """Compile the kernels beside the serving engine and hand them to it."""
    try:
        library = await gently(build.build)
        await engine.adopt(await gently(partial(open_native, directory, loaded, spec, library)))
        loaded.free_weights()
    except (build.CannotBuild, NotSupported, MemoryError) as reason:
        log.warning("serving without kernels", extra={"model": spec.model, "reason": str(reason)})
