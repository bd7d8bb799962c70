"""Opens a text engine: load off the loop, choose a runner, warm up, start. The one import that pulls in torch.

On the CPU the compiled kernels run the model when they know its family. When they are not compiled yet, the engine
serves through transformers' definition at once, compiles in the background and goes over between two steps.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from workers.engine import GenerationRequest, LoadSpec, SamplingParams, TokenPrompt
from workers.text import threads
from workers.text.attention import PagedCache
from workers.text.engine import TextEngine
from workers.text.kv_cache import KVShape, blocks_for
from workers.text.linear import pack, quantize
from workers.text.loader import LoadedModel, choose_dtype, load
from workers.text.native import build
from workers.text.native.decoder import NativeDecoder
from workers.text.native.describe import NotSupported, describe
from workers.text.native.runner import PROBE_TOKENS, NativeRunner, agree, probe
from workers.text.runner import ModelRunner, Runner

log = logging.getLogger(__name__)

Report = Callable[[str, int, int], None]


async def open_text_engine(spec: LoadSpec, report: Report) -> TextEngine:
    """Load `spec` and return a serving engine.

    Raises:
        ModelLoadFailed: the directory cannot be served.
    """
    loaded = await asyncio.to_thread(load, spec, report)
    report("warm-up", 0, 0)
    loaded, runner, may_compile = await asyncio.to_thread(open_runner, loaded, spec)
    engine = TextEngine(loaded, spec, runner)
    log.info("runner chosen", extra={"model": spec.model, "runner": runner.name})
    # The first step of each shape allocates and, eagerly, builds kernels; better now than in somebody's first request.
    warm = GenerationRequest(
        TokenPrompt((0,) * 8), sampling=SamplingParams(temperature=0.0, ignore_eos=True), max_tokens=2
    )
    async for _ in engine.generate(warm):
        pass
    if may_compile:
        engine.keep(asyncio.create_task(_compile_and_adopt(engine, loaded, spec)))
    return engine


def open_runner(loaded: LoadedModel, spec: LoadSpec) -> tuple[LoadedModel, Runner, bool]:
    """Return the best runner that can serve now, and whether compiling the kernels would give a better one.

    The model comes back with the dtype that it is served in: one loaded for the kernels, but refused by them, goes over
    to float32 where torch has no fast bfloat16. Blocking.
    """
    may_compile = False
    if loaded.device.type == "cpu":
        try:
            library = build.built()
            if library is not None:
                runner = open_native(loaded, spec, library)
                return loaded.told(spec.quantize, runner.decoder.weight_bytes), runner, False
            describe(loaded.decoder, loaded.head, loaded.text_config)
            may_compile = not spec.quantize  # quantized weights replace the ones that the kernels would be packed from
        except NotSupported as reason:
            log.info("no kernels for this model", extra={"model": spec.model, "reason": str(reason)})
            if spec.dtype == "auto":
                loaded = loaded.with_dtype(choose_dtype("auto", loaded.dtype, loaded.device))
    if spec.quantize:
        loaded = loaded.told(spec.quantize, loaded.facts.weight_bytes - quantize(loaded.decoder, spec.quantize))
    return loaded, open_eager(loaded, spec, keep_weights=may_compile or bool(spec.quantize)), may_compile


def open_eager(loaded: LoadedModel, spec: LoadSpec, *, keep_weights: bool = False) -> ModelRunner:
    """Return a runner over transformers' definition; its layers are laid out anew unless `keep_weights`."""
    if not keep_weights:
        pack(loaded.model)
    if spec.num_threads:
        chosen = threads.Threads(spec.num_threads, spec.num_threads)
    else:
        chosen = threads.measure(loaded.model, loaded.device)
    log.info("threads chosen", extra={"model": spec.model, "decode": chosen.decode, "prefill": chosen.prefill})
    return ModelRunner(loaded.model, PagedCache(loaded.kv, loaded.dtype, loaded.device), chosen)


def open_native(loaded: LoadedModel, spec: LoadSpec, library: Path) -> NativeRunner:
    """Pack the model for the kernels, prove them on it, and free the module's own weights.

    Raises:
        NotSupported: the kernels do not know this model, or disagree with transformers about it.
    """
    if loaded.vision is not None and loaded.vision.has_three_dimensions:
        raise NotSupported("positions in three dimensions")
    description = describe(loaded.decoder, loaded.head, loaded.text_config)
    # Weights stored in bfloat16 lose nothing by staying so, even where torch computes in float32: so do the kernels.
    stored = torch.bfloat16 in (loaded.dtype, loaded.text_config.dtype) and spec.dtype != "float32"
    plain = "bfloat16" if stored else "float32"
    num_threads = spec.num_threads or len(os.sched_getaffinity(0))
    decoder = NativeDecoder(
        library,
        description,
        weights=spec.quantize or plain,
        cache="float32" if loaded.dtype == torch.float32 else "bfloat16",
        num_blocks=loaded.kv.num_blocks,
        num_threads=num_threads,
    )
    runner = NativeRunner(decoder, num_threads)
    mark = _proof_mark(library, loaded, spec.quantize or plain)
    if not mark.exists():
        if not _proved(runner, loaded, spec.quantize or plain):
            runner.close()
            raise NotSupported("the kernels' logits differ from transformers'")
        mark.touch()
    for module in (loaded.decoder, loaded.head):
        for parameter in module.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype)
    return runner


def _proof_mark(library: Path, loaded: LoadedModel, weights: str) -> Path:
    """A file that says these kernels were proved for this kind of model: once is enough."""
    shape = f"{transformers.__version__} {weights} {loaded.dtype} {loaded.text_config.to_json_string()}"
    return library.with_name(f"{library.stem}-{hashlib.sha256(shape.encode()).hexdigest()[:16]}.proved")


def _proved(runner: NativeRunner, loaded: LoadedModel, weights: str) -> bool:
    shape = KVShape(
        loaded.kv.num_layers, loaded.kv.num_kv_heads, loaded.kv.head_dim, blocks_for(PROBE_TOKENS), PROBE_TOKENS
    )
    every = len(os.sched_getaffinity(0))
    reference = ModelRunner(loaded.model, PagedCache(shape, loaded.dtype, loaded.device), threads.Threads(every, every))
    steps = probe(int(loaded.head.weight.shape[0]))
    got = torch.cat([runner.run_packed(step) for step in steps])
    expected = torch.cat([reference.run_packed(step) for step in steps])
    return agree(got, expected, weights)


async def _compile_and_adopt(engine: TextEngine, loaded: LoadedModel, spec: LoadSpec) -> None:
    """Compile the kernels beside the serving engine and hand them to it."""
    try:
        library = await asyncio.to_thread(build.build)
        engine.adopt(await asyncio.to_thread(open_native, loaded, spec, library))
    except (build.CannotBuild, NotSupported, MemoryError) as reason:
        log.warning("serving without kernels", extra={"model": spec.model, "reason": str(reason)})
