"""Opens a text engine: load off the loop, warm up, start. The one import that pulls in torch and transformers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import torch

from workers.engine import GenerationRequest, LoadSpec, SamplingParams, TokenPrompt
from workers.text.engine import TextEngine
from workers.text.loader import load

Report = Callable[[str, int, int], None]


async def open_text_engine(spec: LoadSpec, report: Report) -> TextEngine:
    """Load `spec` and return a serving engine.

    Raises:
        ModelLoadFailed: the directory cannot be served.
    """
    if spec.num_threads:
        torch.set_num_threads(spec.num_threads)
    loaded = await asyncio.to_thread(load, spec, report)
    report("warm-up", 0, 0)
    engine = TextEngine(loaded, spec)
    # The first step of each shape builds kernels; better now than in somebody's first request.
    warm = GenerationRequest(
        TokenPrompt((0,) * 8), sampling=SamplingParams(temperature=0.0, ignore_eos=True), max_tokens=2
    )
    async for _ in engine.generate(warm):
        pass
    return engine
