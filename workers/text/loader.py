"""Brings a model's weights into a transformers module, from its directory or from another worker that sleeps. Below
stand transformers' definitions, seconds to import.

Above: `opening.py`, which comes here only when the kernels cannot take the weights straight from the files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from hostler.errors import ModelLoadFailed
from transformers import AutoModelForCausalLM, modeling_utils
from transformers.utils.logging import disable_progress_bar

from workers.engine import LoadSpec, ModelFacts
from workers.text import attention, shelf, vision
from workers.text.adapters import linear_layers, read_adapters
from workers.text.directory import Directory, LoadedModel, read_directory

log = logging.getLogger(__name__)

Report = Callable[[str, int, int], None]


def load(
    spec: LoadSpec, report: Report, directory: Directory | None = None, split: Mapping[str, Any] | None = None
) -> LoadedModel:
    """Load `spec.path`. Blocking: seconds. `report(stage, done_bytes, total_bytes)` tells progress.

    Args:
        directory: what was read of it before.
        split: for a model over several devices: what transformers must be told to put each part where it belongs. With
            a `distributed_config` the parameters are this rank's part, but the facts are of the whole.

    Raises:
        ModelLoadFailed: the directory or the architecture cannot be served; says which.
    """
    directory = directory or read_directory(spec)
    total = sum(file.stat().st_size for file in directory.weight_files)
    report("read", 0, total)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    # It would put all weights into one segment, of which torch can give nothing back until the last of them is gone:
    # not what layers leave that are joined or quantized.
    modeling_utils.caching_allocator_warmup = lambda *_: None
    options: dict[str, Any] = {
        "config": directory.config,
        "dtype": directory.dtype,
        "trust_remote_code": spec.trust_remote_code,
        "local_files_only": True,
        "use_safetensors": True,
    }
    if split:
        options.update(split)
    elif directory.device.type != "cpu" and not spec.quantize:  # Straight there, in several threads.
        options["device_map"] = {"": str(directory.device)}
    try:
        if vision.is_image_text(directory.config):
            model = vision.load_model(directory.path, attention.NAME, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(directory.path, attn_implementation=attention.NAME, **options)
    except Exception as error:  # transformers raises anything here: missing weights, truncated files, unknown types
        raise ModelLoadFailed(f"The weights of {spec.model} cannot be loaded: {type(error).__name__}.") from error
    model = model.train(False).requires_grad_(False)
    report("read", total, total)
    return directory.loaded(
        spec,
        architecture=type(model).__name__,
        num_parameters=sum(p.numel() for p in model.parameters()),
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        model=model,
        vision=_open_vision(spec, model, directory) if vision.serves_images(directory.config) else None,
        adapters=read_adapters(spec.adapters, linear_layers(model)) if spec.adapters else (),
    )


def take_over(spec: LoadSpec, report: Report, directory: Directory) -> LoadedModel | None:
    """Return the model that waits on `spec.shelf`, on the device of `directory`; None if it cannot be had from there.

    Blocking: as long as copying the weights to the device takes.
    """
    try:
        model, facts = shelf.take_over(spec.shelf)
    except shelf.CannotTakeOver as reason:
        log.warning("the sleeping model is not taken over", extra={"model": spec.model, "reason": str(reason)})
        return None
    if not isinstance(facts, ModelFacts) or facts.model != spec.model:
        log.warning("what sleeps is another model", extra={"model": spec.model, "found": str(facts)[:300]})
        return None
    report("read", 0, facts.weight_bytes)
    shelf.move(model, directory.device)
    report("read", facts.weight_bytes, facts.weight_bytes)
    loaded = directory.loaded(
        spec,
        architecture=facts.architecture,
        num_parameters=facts.num_parameters,
        weight_bytes=facts.weight_bytes,
        model=model,
        vision=_open_vision(spec, model, directory) if vision.serves_images(directory.config) else None,
    )
    return loaded.told(spec.quantize, facts.weight_bytes)


def _open_vision(spec: LoadSpec, model: Any, directory: Directory) -> vision.Vision | None:
    """Return the model's eyes; None, with a warning, if its directory lacks what they need: text is still served."""
    try:
        return vision.Vision(model, directory.tokenizer, directory.path)
    except Exception as error:  # as above: missing files, unknown processors
        log.warning(
            "images not served", extra={"model": spec.model, "reason": f"{type(error).__name__}: {error}"[:300]}
        )
        return None
