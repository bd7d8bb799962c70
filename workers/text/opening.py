"""Opens a text engine: load off the loop, warm up, start. The one import that pulls in torch and transformers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from workers.engine import GenerationRequest, LoadSpec, SamplingParams, TokenPrompt
from workers.text import threads
from workers.text.engine import TextEngine
from workers.text.loader import load

log = logging.getLogger(__name__)

Report = Callable[[str, int, int], None]


async def open_text_engine(spec: LoadSpec, report: Report) -> TextEngine:
    """Load `spec` and return a serving engine.

    Raises:
        ModelLoadFailed: the directory cannot be served.
    """
    loaded = await asyncio.to_thread(load, spec, report)
    report("warm-up", 0, 0)
    if spec.num_threads:
        chosen = threads.Threads(spec.num_threads, spec.num_threads)
    else:
        chosen = await asyncio.to_thread(threads.measure, loaded.model, loaded.device)
    log.info("threads chosen", extra={"model": spec.model, "decode": chosen.decode, "prefill": chosen.prefill})
    engine = TextEngine(loaded, spec, chosen)
    # The first step of each shape builds kernels; better now than in somebody's first request.
    warm = GenerationRequest(
        TokenPrompt((0,) * 8), sampling=SamplingParams(temperature=0.0, ignore_eos=True), max_tokens=2
    )
    async for _ in engine.generate(warm):
        pass
    return engine
