"""Opens an embedding model or a cross-encoder: reads its directory, loads its weights, starts the engine.

Above: `host.py`. Below: transformers' auto classes, `recipe.py`, `models.py`. Weights are read from safetensors only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hostler.errors import HostlerError, ModelLoadFailed
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoTokenizer,
)
from transformers.utils.logging import disable_progress_bar

from workers.embedding.engine import EmbeddingEngine, Loaded
from workers.embedding.models import CrossEncoder, EmbeddingModel, SequenceModel
from workers.embedding.recipe import DenseLayer, Recipe, read_recipe
from workers.embedding.texts import TextEncoder
from workers.engine import LoadSpec, ModelFacts
from workers.refusals import refuse_beams, refuse_text_options

Report = Callable[[str, int, int], None]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_ACTIVATIONS: dict[str, type[torch.nn.Module]] = {
    name: getattr(torch.nn, name) for name in ("Tanh", "Identity", "ReLU", "GELU", "Sigmoid", "SiLU")
}
# Their positions begin after the padding's own.
_SHIFTED_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "data2vec-text"}
_ROPES_WITH_STATE = {"dynamic", "longrope"}
_UNKNOWN_LIMIT = 512
_NO_LIMIT = 10**6  # tokenizers say "none" with a number beyond any context


async def open_embedding_engine(spec: LoadSpec, report: Report) -> EmbeddingEngine:
    """Load an embedding model and return its engine.

    Raises:
        ModelLoadFailed: the directory cannot be served.
        UnsupportedParameter: an option that this engine does not have.
    """
    return EmbeddingEngine(await asyncio.to_thread(load, spec, report, scores_pairs=False), spec)


async def open_rerank_engine(spec: LoadSpec, report: Report) -> EmbeddingEngine:
    """Load a cross-encoder and return its engine.

    Raises:
        ModelLoadFailed: the directory cannot be served, or the model has more than one label.
        UnsupportedParameter: an option that this engine does not have.
    """
    return EmbeddingEngine(await asyncio.to_thread(load, spec, report, scores_pairs=True), spec)


def load(spec: LoadSpec, report: Report, *, scores_pairs: bool) -> Loaded:
    """Load `spec.path` and run it once. Blocking: seconds.

    Raises:
        ModelLoadFailed, UnsupportedParameter: as above.
    """
    refuse_text_options(spec, "embedding models")
    refuse_beams(spec, "embedding models")
    path, device = Path(spec.path), torch.device(spec.device)
    total = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    report("read", 0, total)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    recipe = Recipe() if scores_pairs else read_recipe(path)
    trusted: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(path, **trusted)
        tokenizer = AutoTokenizer.from_pretrained(path, **trusted)
    except Exception as error:  # transformers raises anything here
        raise ModelLoadFailed(f"The files of {spec.model} cannot be read: {type(error).__name__}.") from error
    if scores_pairs and config.num_labels != 1:
        raise ModelLoadFailed(f"{spec.model} has {config.num_labels} labels; to rank documents a model must have one.")
    dtype = _dtype(spec.dtype, config, device)
    options = {**trusted, "config": config, "dtype": dtype, "use_safetensors": True}
    module = _load_module(spec.model, path, options, scores_pairs=scores_pairs).to(device)
    report("read", total, total)
    text = config.get_text_config()
    limit = max_tokens(spec, recipe, tokenizer, text)
    vocab_size = int(text.vocab_size)
    encoder = TextEncoder(tokenizer, vocab_size=vocab_size, max_tokens=limit)
    pad_id = int(tokenizer.pad_token_id or 0)
    model: SequenceModel
    if scores_pairs:
        model = CrossEncoder(module, pad_id=pad_id)
    else:
        layers = [_dense(spec.model, layer).to(device) for layer in recipe.dense]
        skipped = 0 if recipe.include_prompt or not recipe.prompt else _prompt_tokens(tokenizer, recipe.prompt)
        pooled = int(text.hidden_size) * len(recipe.pooling)
        model = EmbeddingModel(
            module,
            pooling=recipe.pooling,
            dense=layers,
            normalize=recipe.normalize,
            num_prompt_tokens=skipped,
            pad_id=pad_id,
            width=layers[-1].width if layers else pooled,
        )
    report("warm-up", 0, 0)
    model.run(encoder.pairs("a", ["b"]) if scores_pairs else encoder.documents(["a"]))
    facts = ModelFacts(
        model=spec.model,
        engine="rerank" if scores_pairs else "embedding",
        architecture=type(module).__name__,
        dtype=str(dtype).removeprefix("torch."),
        max_context_tokens=limit,
        vocab_size=vocab_size,
        num_parameters=sum(p.numel() for p in module.parameters()),
        weight_bytes=sum(p.numel() * p.element_size() for p in module.parameters()),
        embedding_dimensions=0 if scores_pairs else model.width,
    )

    def decode(ids: Any) -> str:
        return str(tokenizer.decode(ids))

    return Loaded(
        model,
        encoder,
        decode,
        facts,
        recipe,
        scores_pairs=scores_pairs,
        on_gpu=device.type != "cpu",
        is_reentrant=is_reentrant(spec, text),
    )


def max_tokens(spec: LoadSpec, recipe: Recipe, tokenizer: Any, text_config: Any) -> int:
    """Return the longest input: the least of what the recipe, the tokenizer, the positions and the options allow."""
    positions = int(getattr(text_config, "max_position_embeddings", 0) or 0)
    if positions and text_config.model_type in _SHIFTED_POSITIONS:
        positions -= int(text_config.pad_token_id or 0) + 1
    known = [recipe.max_tokens, int(min(tokenizer.model_max_length, _NO_LIMIT)), positions, spec.max_context_tokens]
    limits = [limit for limit in known if 0 < limit < _NO_LIMIT]
    return min(limits, default=_UNKNOWN_LIMIT)


def is_reentrant(spec: LoadSpec, text_config: Any) -> bool:
    """Whether several threads may run it at once: not what changes its rotary frequencies with the text's length."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    kinds = {parameters.get("rope_type"), *(p.get("rope_type") for p in parameters.values() if isinstance(p, dict))}
    return not spec.trust_remote_code and not kinds & _ROPES_WITH_STATE


def _dtype(wanted: str, config: Any, device: torch.device) -> torch.dtype:
    """As wanted; else float32 on a CPU, where vectors then equal other implementations', and as stored on a GPU."""
    if wanted != "auto":
        return _DTYPES[wanted]
    stored: object = getattr(config.get_text_config(), "dtype", None)
    if device.type != "cpu" and isinstance(stored, torch.dtype) and stored in _DTYPES.values():
        return stored
    return torch.float32


def _load_module(model: str, path: Path, options: dict[str, Any], *, scores_pairs: bool) -> Any:
    kind: Any = AutoModel
    if scores_pairs:
        kind = AutoModelForSequenceClassification
    elif options["config"].is_encoder_decoder:
        kind = AutoModelForTextEncoding
    try:
        module, found = kind.from_pretrained(path, output_loading_info=True, **options)
    except HostlerError:
        raise
    except Exception as error:  # missing weights, truncated files, unknown types
        raise ModelLoadFailed(f"The weights of {model} cannot be loaded: {type(error).__name__}.") from error
    # Bert's own pooler is not used for embeddings and often absent; whatever else is missing would be random numbers.
    missing = [name for name in found["missing_keys"] if scores_pairs or not name.startswith("pooler.")]
    if missing:
        raise ModelLoadFailed(f"The weights of {model} lack {len(missing)} tensors, {sorted(missing)[0]} among them.")
    return module.train(False).requires_grad_(False)


class _Dense(torch.nn.Module):
    """A linear layer and its activation, float32. `width`: of what comes out."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: torch.nn.Module) -> None:
        super().__init__()
        self.width = int(weight.shape[0])
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", None if bias is None else bias.float())
        self.activation = activation

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return (batch, width) of (batch, in)."""
        out: torch.Tensor = self.activation(torch.nn.functional.linear(vectors, self.weight, self.bias))
        return out


def _dense(model: str, layer: DenseLayer) -> _Dense:
    try:
        tensors = load_file(layer.directory / "model.safetensors")
        weight, bias = tensors["linear.weight"], tensors.get("linear.bias")
    except Exception as error:
        raise ModelLoadFailed(
            f"The dense layer {layer.directory.name} of {model} cannot be loaded: {type(error).__name__}."
        ) from error
    kind = _ACTIVATIONS.get(layer.activation.rpartition(".")[2])
    if kind is None:
        raise ModelLoadFailed(f"The activation {layer.activation[:80]} of a dense layer of {model} is not known here.")
    return _Dense(weight, bias, kind())


def _prompt_tokens(tokenizer: Any, prompt: str) -> int:
    """Return how many leading tokens a prompt takes: all of them but a special token at its end."""
    ids = tokenizer(prompt, truncation=False)["input_ids"]
    return len(ids) - int(bool(ids) and ids[-1] in tokenizer.all_special_ids)
