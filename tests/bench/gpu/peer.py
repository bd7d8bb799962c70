"""Transformers' own continuous batching on the same model and prompts, beside what the engine did with them.

Above: the steps. Below: `generate_batch` of the installed transformers, as it comes.
"""

from __future__ import annotations

import gc
import time
from typing import Any

from tests.bench.engine import prompt_ids

from .floor import PEER_GOAL
from .found import Failed, Found, Setting, say
from .shapes import build, chosen_shape, model_folder
from .speed import STREAMS_FIRST_NUMBER, WARM_FIRST_NUMBER, sizes_of


def measure(setting: Setting) -> Found:
    """Time transformers' continuous batching; the engine's figure comes from its own step in the same run."""
    import torch
    from transformers import AutoModelForCausalLM

    sizes, shape = sizes_of(setting), chosen_shape(setting)
    folder = build(shape, model_folder(setting), setting.device)
    say("  loading")
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16 if setting.is_cuda else torch.float32,
        device_map=setting.device,
        local_files_only=True,
    ).train(False)
    found = Found()
    try:
        say(f"  {sizes.streams} streams, once to warm up and once to be timed")
        prompts = [
            [prompt_ids(first + index, sizes.stream_prompt, shape.vocab) for index in range(sizes.streams)]
            for first in (WARM_FIRST_NUMBER, STREAMS_FIRST_NUMBER)
        ]
        # The manager stays between the two: graphs, cache and compiled code of the first are the second's.
        _generate(model, prompts[0], sizes.stream_new)
        counts, spent_s = _generate(model, prompts[1], sizes.stream_new)
    finally:
        if (destroy := getattr(model, "destroy_cached_continuous_batching_manager", None)) is not None:
            destroy()
        attention = getattr(model.config, "_attn_implementation", "unknown")
        del model
        gc.collect()
    if wrong := sorted({count for count in counts if count != sizes.stream_new}):
        raise Failed(f"transformers' replies are not all {sizes.stream_new} tokens long: {wrong}")
    _tell(found, setting, sum(counts) / spent_s, str(attention), sizes.streams)
    return found


def _tell(found: Found, setting: Setting, per_s: float, attention: str, streams: int) -> None:
    ours = setting.figures.get("streams_tokens_per_s")
    what = f"transformers' continuous batching, {streams} streams ({attention})"
    found.figures["peer_tokens_per_s"] = per_s
    found.add(what, f"{per_s:,.0f} tokens/s")
    if ours is None:
        found.notices.append("hostler's own throughput was not measured in this run: no ratio (step speed)")
    else:
        found.figures["streams_over_peer"] = ours / per_s
        found.add("hostler over transformers", f"{ours:,.0f} to {per_s:,.0f} tokens/s", ours / per_s, PEER_GOAL, "×")


def _generate(model: Any, prompts: list[list[int]], new: int) -> tuple[list[int], float]:
    """Return how many tokens each reply has, and the seconds from the first request to the last reply's end.

    By transformers' own clock, so that starting and stopping its manager does not count. Greedy; the end token is one
    that never comes.
    """
    from transformers import GenerationConfig

    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    config = GenerationConfig(**settings)  # type: ignore[no-untyped-call]
    options: dict[str, Any] = {"generation_config": config, "persistent_manager": True}
    if model.device.type == "cpu":  # where it would take most of the memory for its cache, and attend to all of it
        from transformers import ContinuousBatchingConfig

        options["continuous_batching_config"] = ContinuousBatchingConfig(num_blocks=64, block_size=16)
    began_s = time.perf_counter()
    replies = model.generate_batch(inputs=prompts, **options)
    spent_s = time.perf_counter() - began_s
    if len(replies) != len(prompts):
        raise Failed(f"transformers answered {len(replies)} of {len(prompts)} prompts")
    if errors := [reply.error for reply in replies.values() if reply.error]:
        raise Failed(f"transformers failed: {errors[0]}")
    own_s = max(r.lifespan[1] for r in replies.values()) - min(r.created_time for r in replies.values())
    return [len(reply.generated_tokens) for reply in replies.values()], own_s if 0 < own_s < spent_s else spent_s
