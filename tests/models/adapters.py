"""LoRA adapters of the tiny models with random weights, in peft's files; and models that have them merged.

Above it: the tests of every room that serves adapters. Below it: torch, safetensors, transformers; not peft.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERY_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def write_adapter(
    directory: Path,
    base: Path,
    *,
    seed: int,
    rank: int = 4,
    alpha: float = 8.0,
    targets: Collection[str] = EVERY_LINEAR,
    layers: Collection[int] = (0, 1),
    use_rslora: bool = False,
) -> Path:
    """Write adapter_config.json and adapter_model.safetensors for a base model; return the directory."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(seed)
    tensors = {}
    with safe_open(base / "model.safetensors", framework="pt") as weights:  # type: ignore[no-untyped-call]
        for key in sorted(weights.keys()):
            path = key.removesuffix(".weight")
            if path.rpartition(".")[2] not in targets or not any(f".layers.{i}." in path for i in layers):
                continue
            outputs, inputs = weights.get_slice(key).get_shape()
            for side, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                values = torch.randn(shape, generator=random) * 0.3
                tensors[f"base_model.model.{path}.lora_{side}.weight"] = values
    assert tensors
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.05,
        "use_rslora": use_rslora,
        "target_modules": sorted(targets),
        "layers_to_transform": sorted(layers),
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "qalora_group_size": 16,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def merged(base: Path, adapter: Path) -> Any:
    """Return transformers' float32 model whose weights are W + scale * B A."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for key, down in tensors.items():
            if key.endswith(".lora_A.weight"):
                path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                up = tensors[key.replace("lora_A", "lora_B")]
                model.get_submodule(path).weight.add_(scale * up @ down)
    return model
