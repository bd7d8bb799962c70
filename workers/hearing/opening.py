"""Opens a speech model: reads its directory, loads its weights, starts the engine.

Above: `host.py`. Below: transformers' Whisper, `vocabulary.py`, `whisper.py`. Weights are read from safetensors only.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hostler.errors import HostlerError, ModelLoadFailed
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.models.whisper.feature_extraction_whisper import WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from workers.embedding.texts import TextEncoder
from workers.engine import LoadSpec, ModelFacts
from workers.hearing.audio import Samples
from workers.hearing.decoding import Decoding
from workers.hearing.engine import HearingEngine, Loaded
from workers.hearing.listening import Features, Listener, Threads, as_floats
from workers.hearing.unpacking import SAMPLE_RATE_HZ
from workers.hearing.vocabulary import read_vocabulary
from workers.hearing.whisper import Whisper, shape_of
from workers.memory import trim
from workers.refusals import refuse_text_options
from workers.text.threads import choose
from workers.text.vocabulary import TokenBytes

Report = Callable[[str, int, int], None]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MIN_ROWS = 2
CPU_ROWS, GPU_ROWS = 8, 16
ROWS_BYTES = 600 * 10**6
"""As many rows as these bytes hold, 2 … so many. The store's estimate of a footprint follows the rule for a CPU, whose
float32 rows are twice as large as a GPU's."""

_TIMED_ROWS = 1500
_KIND: Any = WhisperForConditionalGeneration


async def open_hearing_engine(spec: LoadSpec, report: Report) -> HearingEngine:
    """Load a speech model and return its engine.

    Raises:
        ModelLoadFailed: the directory cannot be served, or holds a speech model of another family than Whisper's.
        UnsupportedParameter: an option that this engine does not have.
    """
    loaded, listener = await asyncio.to_thread(load, spec, report)
    return HearingEngine(loaded, listener, spec)


def load(spec: LoadSpec, report: Report) -> tuple[Loaded, Listener]:
    """Load `spec.path`. Blocking: seconds.

    Raises:
        ModelLoadFailed, UnsupportedParameter: as above.
    """
    refuse_text_options(spec, "speech models")
    path, device = Path(spec.path), torch.device(spec.device)
    total = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    report("read", 0, total)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    trusted: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(path, **trusted)
        if config.model_type != "whisper":
            raise ModelLoadFailed(
                f"{spec.model} is a speech model of the type {str(config.model_type)[:40]!r}; of those that write "
                "speech down only the Whisper family is served."
            )
        tokenizer = AutoTokenizer.from_pretrained(path, **trusted)
        extractor = WhisperFeatureExtractor.from_pretrained(path, local_files_only=True)
        generation = GenerationConfig.from_pretrained(path) if (path / "generation_config.json").is_file() else None
    except HostlerError:
        raise
    except Exception as error:  # transformers raises anything here
        raise ModelLoadFailed(f"The files of {spec.model} cannot be read: {type(error).__name__}.") from error
    module = _load_module(spec, path, config, device)
    report("read", total, total)
    shape = shape_of(module.config)
    try:
        vocabulary = read_vocabulary(tokenizer, generation, shape.vocabulary)
    except KeyError as error:
        raise ModelLoadFailed(f"The tokenizer of {spec.model} lacks the token {error}.") from error
    sizes = [(parameter.numel(), parameter.element_size()) for parameter in module.parameters()]
    item_bytes = module.model.decoder.layers[0].fc1.weight.element_size()
    whisper = Whisper(module, num_rows(shape.values_per_row(spec.beams) * item_bytes, device), spec.beams)
    encoder = TextEncoder(tokenizer, vocab_size=shape.vocabulary, max_tokens=shape.num_tokens)

    def text_of(ids: Sequence[int]) -> str:
        # As said: tidying spaces up would put windows' texts together wrongly.
        return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def encode(text: str) -> list[int]:
        return [int(i) for i in tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)]

    facts = ModelFacts(
        model=spec.model,
        engine="transcription",
        architecture=type(module).__name__,
        dtype=str(module.model.encoder.conv1.weight.dtype).removeprefix("torch."),
        max_context_tokens=shape.num_tokens,
        vocab_size=shape.vocabulary,
        num_parameters=sum(count for count, _ in sizes),
        weight_bytes=sum(count * size for count, size in sizes),
        supports_audio=True,
    )
    loaded = Loaded(vocabulary, facts, encode, encoder.prompt, text_of, TokenBytes(tokenizer))
    listener = Listener(
        whisper,
        Decoding(whisper, vocabulary, text_of),
        _features(extractor),
        _alignment_heads(generation, shape.layers, shape.heads),
        _threads(module, whisper.dtype, spec),
    )
    report("warm-up", total, total)
    listener.warm_up()
    trim()
    return loaded, listener


def num_rows(row_bytes: int, device: torch.device) -> int:
    """Return how many windows are decoded at once, given what one takes."""
    most = CPU_ROWS if device.type == "cpu" else GPU_ROWS
    return max(MIN_ROWS, min(most, ROWS_BYTES // row_bytes))


def _load_module(spec: LoadSpec, path: Path, config: Any, device: torch.device) -> Any:
    """Return the model. On a CPU "auto" is float32, but its products bfloat16 where the processor has them.

    That is the encoder, which does nine tenths of the arithmetic, and the linear layers of the decoder, whose steps are
    bound by reading them; what passes between the decoder's layers stays float32.
    """
    dtype = _dtype(spec.dtype, config, device)
    try:
        module, found = _KIND.from_pretrained(
            path, config=config, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # missing weights, truncated files
        raise ModelLoadFailed(f"The weights of {spec.model} cannot be loaded: {type(error).__name__}.") from error
    if missing := sorted(name for name in found["missing_keys"] if name != "proj_out.weight"):
        raise ModelLoadFailed(f"The weights of {spec.model} lack {len(missing)} tensors, {missing[0]} among them.")
    module.train(False).requires_grad_(False).to(device)
    if spec.dtype == "auto" and device.type == "cpu" and multiplies_bfloat16():
        module.model.encoder.to(torch.bfloat16)
        for layer in module.model.decoder.layers.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.to(torch.bfloat16)
    return module


def _dtype(wanted: str, config: Any, device: torch.device) -> torch.dtype:
    if wanted != "auto":
        return _DTYPES[wanted]
    if device.type == "cpu":
        return torch.float32
    stored: object = getattr(config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) and stored.itemsize == 2 else torch.float16


def multiplies_bfloat16() -> bool:
    """Return whether this processor has instructions for products of bfloat16."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _features(extractor: Any) -> Features:
    def features(windows: Sequence[Samples]) -> torch.Tensor:
        found = extractor(
            [as_floats(samples) for samples in windows], sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt"
        )
        mels: torch.Tensor = found.input_features
        return mels

    return features


def _alignment_heads(generation: Any, layers: int, heads: int) -> list[tuple[int, int]]:
    """Return the heads that follow the speech, as the model's files tell; else all of the decoder's second half."""
    told = getattr(generation, "alignment_heads", None)
    pairs = [(int(layer), int(head)) for layer, head in told or ()]
    if pairs and all(layer < layers and head < heads for layer, head in pairs):
        return pairs
    return [(layer, head) for layer in range(layers // 2, layers) for head in range(heads)]


def _threads(module: Any, decoder_dtype: torch.dtype, spec: LoadSpec) -> Threads:
    encoder, decoder = module.model.encoder, module.model.decoder
    if encoder.conv1.weight.device.type != "cpu":
        return Threads()
    if spec.num_threads:
        return Threads(spec.num_threads, spec.num_threads)

    @torch.inference_mode()
    def seconds(layer: Any, dtype: torch.dtype, rows: int, count: int) -> float:
        torch.set_num_threads(count)
        hidden = torch.zeros((rows, layer.in_features), dtype=dtype)
        samples = []
        for _ in range(4):
            began = time.perf_counter()
            layer(hidden)
            samples.append(time.perf_counter() - began)
        return min(samples[1:])

    cores = len(os.sched_getaffinity(0))
    return Threads(
        choose(partial(seconds, encoder.layers[0].fc1, encoder.conv1.weight.dtype, _TIMED_ROWS), cores),
        choose(partial(seconds, decoder.layers[0].fc1, decoder_dtype, CPU_ROWS * spec.beams), cores),
    )
