"""How a model's last hidden states become vectors, from the files that sentence-transformers keeps beside it. Pure.

Above: `loader.py`. Below: JSON files. `modules.json` names the steps after the transformer; each has a folder with a
`config.json`. Without it the architecture decides: the last token of a causal model, the mean of any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hostler.errors import ModelLoadFailed

POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_DOCUMENT_PROMPTS = ("document", "passage")


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """A linear layer after the pooling: where its weights are, and the class that torch calls its activation."""

    directory: Path
    activation: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """What happens to a model's hidden states, in this order: pool, dense layers, normalise.

    Attributes:
        pooling: modes whose vectors are joined end to end.
        include_prompt: whether the tokens of `prompt` are pooled with the text's.
        dense: layers after the pooling.
        normalize: vectors get length 1.
        max_tokens: longest input; 0: as long as the model's positions reach.
        prompt: text put before each input.
        query_prompt, document_prompt: the same for the two sides of a ranking.
    """

    pooling: tuple[str, ...] = ("mean",)
    include_prompt: bool = True
    dense: tuple[DenseLayer, ...] = ()
    normalize: bool = False
    max_tokens: int = 0
    prompt: str = ""
    query_prompt: str = ""
    document_prompt: str = ""


@dataclass(slots=True)
class _Steps:
    pooling: tuple[str, ...] | None = None
    include_prompt: bool = True
    dense: list[DenseLayer] = field(default_factory=list)
    normalize: bool = False


def read_recipe(path: Path) -> Recipe:
    """Return the recipe of the model in directory `path`.

    Raises:
        ModelLoadFailed: a file is damaged, or names a step that is not known here.
    """
    steps = _read_steps(path)
    config = _object(path / "config_sentence_transformers.json")
    prompts = {str(name): str(text) for name, text in (config.get("prompts") or {}).items()}
    default = prompts.get(str(config.get("default_prompt_name") or ""), "")
    limit = _object(path / "sentence_bert_config.json").get("max_seq_length")
    return Recipe(
        pooling=steps.pooling or (_usual_pooling(_object(path / "config.json")),),
        include_prompt=steps.include_prompt,
        dense=tuple(steps.dense),
        # Whoever gives no recipe at all gets what embeddings are compared by.
        normalize=steps.normalize or steps.pooling is None,
        max_tokens=limit if isinstance(limit, int) and limit > 0 else 0,
        prompt=default,
        query_prompt=prompts.get("query", default),
        document_prompt=next((prompts[name] for name in _DOCUMENT_PROMPTS if name in prompts), default),
    )


def _read_steps(path: Path) -> _Steps:
    steps = _Steps()
    for module in _read(path / "modules.json", []):
        if not isinstance(module, dict):
            raise ModelLoadFailed("modules.json is not a list of modules.")
        # The packages that these classes live in have moved; their names have not.
        kind = str(module.get("type", "")).rpartition(".")[2]
        folder = path / Path(str(module.get("path", ""))).name
        if kind == "Pooling":
            config = _object(folder / "config.json")
            steps.pooling = _pooling(config)
            steps.include_prompt = config.get("include_prompt", True) is not False
        elif kind == "Dense":
            steps.dense.append(_dense(folder))
        elif kind == "Normalize":
            steps.normalize = True
        elif kind != "Transformer" or module.get("path"):
            raise ModelLoadFailed(f"This embedding model has a step that is not known here: {kind[:60] or 'unnamed'}.")
    return steps


def _pooling(config: Mapping[str, Any]) -> tuple[str, ...]:
    named = config.get("pooling_mode")
    if named is None:
        modes = [mode for key, mode in _LEGACY_MODES.items() if config.get(key)] or ["mean"]
    else:
        modes = [named] if isinstance(named, str) else list(named)
    unknown = [mode for mode in modes if mode not in POOLING_MODES]
    if unknown:
        raise ModelLoadFailed(f"This embedding model pools in a way that is not known here: {str(unknown[0])[:60]}.")
    return tuple(modes)


def _dense(folder: Path) -> DenseLayer:
    config = _object(folder / "config.json")
    # Newer files may send a layer's input elsewhere, or add it to the output.
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise ModelLoadFailed(f"A dense layer of this embedding model has a {key} that is not known here.")
    if config.get("use_residual"):
        raise ModelLoadFailed("A dense layer of this embedding model has a residual, which is not known here.")
    return DenseLayer(folder, str(config.get("activation_function", "torch.nn.modules.activation.Tanh")))


def _usual_pooling(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures") or [""]
    return "lasttoken" if str(architectures[0]).endswith("ForCausalLM") else "mean"


def _read(path: Path, absent: object) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return absent
    except (OSError, ValueError) as error:
        raise ModelLoadFailed(f"{path.name} cannot be read: {type(error).__name__}.") from error


def _object(path: Path) -> dict[str, Any]:
    value = _read(path, {})
    if not isinstance(value, dict):
        raise ModelLoadFailed(f"{path.name} is not a JSON object.")
    return value
