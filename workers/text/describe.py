"""Reads from a transformers module what `decoder.cpp` must know of it, or says why the kernels cannot run it.

Above: `runner.py`. Below: transformers' modules, read only. The kernels know one shape of decoder: RMS norms, rotary
positions in halves, grouped heads, a gated MLP or several that a router chooses from. The families below have it; a
description is proved against the module's own output before it serves (see `runner.py`), so a family that changes its
arithmetic is noticed, not served wrongly.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from workers.text.adapters import AdaptedLayer

FAMILIES = frozenset(
    {
        "llama", "mistral", "ministral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "smollm3", "gemma", "gemma3_text",
        "granite",
    }
)  # fmt: skip
_ROPES = frozenset({"default", "linear", "llama3", "yarn"})
# What configurations say of each layer: attention to everything or a window, positions rotated or not.
_BY_LAYER = ("layer_types", "no_rope_layers")
_ACTIVATIONS = {"silu": False, "gelu_pytorch_tanh": True}


class NotSupported(Exception):
    """The kernels cannot run this model; the message says what stands against it."""


@dataclass(frozen=True, slots=True)
class Mlp:
    """A gated MLP's weights: gate and up (intermediate, hidden) each, and down (hidden, intermediate)."""

    gate_up: tuple[torch.Tensor, torch.Tensor]
    down: torch.Tensor


@dataclass(frozen=True, slots=True)
class Router:
    """What chooses MLPs for a token, its experts.

    Attributes:
        weight: (experts, hidden); softmax of its outputs gives their shares.
        chosen: how many see a token, those of the greatest shares.
        normalized: whether the shares of the chosen are made to add up to one.
    """

    weight: torch.Tensor
    chosen: int
    normalized: bool


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's tensors, each as the module holds it.

    Attributes:
        qkv, out: (outputs, inputs) weights, those of one product together.
        mlps: one, or as many as a router chooses from.
        router: None for one.
        qkv_bias, out_bias: in the same order as the weights; empty for none.
        norms: attention, after attention, MLP, after MLP, query, key, each less the description's `norm_offset`; None
            where there is none.
        window: positions that a query sees, 0 for all.
        rope: which of the description's frequencies; -1 for no rotary positions.
    """

    qkv: tuple[torch.Tensor, ...]
    out: torch.Tensor
    mlps: tuple[Mlp, ...]
    router: Router | None
    qkv_bias: tuple[torch.Tensor, ...]
    out_bias: tuple[torch.Tensor, ...]
    norms: tuple[torch.Tensor | None, ...]
    window: int
    rope: int


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary frequencies (rotary_dim / 2,) float32, and what cosines and sines are multiplied by."""

    frequencies: torch.Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class Description:
    """Everything the kernels need of one model."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    gelu: bool
    eps: float
    embed_scale: float
    attention_scale: float
    residual_scale: float
    logit_scale: float
    norm_offset: float
    ropes: tuple[Rope, ...]
    layers: tuple[Layer, ...]
    final_norm: torch.Tensor
    head: torch.Tensor
    embedding: torch.Tensor | None


def describe(decoder: Any, head: Any, config: Any) -> Description:
    """Return the description of a text decoder.

    Args:
        decoder: the module with `embed_tokens`, `layers`, `norm`, `rotary_emb`.
        head: the output projection.
        config: its text configuration.

    Raises:
        NotSupported: the kernels lack something that this model has.
    """
    if config.model_type not in FAMILIES:
        raise NotSupported(f"models of type {config.model_type} run through transformers' own definition")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in _ACTIVATIONS:
        raise NotSupported(f"activation {activation}")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None) is not None:
            raise NotSupported(name)
    attention = decoder.layers[0].self_attn
    ropes, rope_of = _ropes(decoder, config)
    embedding = decoder.embed_tokens
    tied = head.weight.data_ptr() == embedding.weight.data_ptr()
    scale = getattr(embedding, "embed_scale", None)
    layers = tuple(_layer(layer, rope_of(i), config) for i, layer in enumerate(decoder.layers))
    described = Description(
        hidden=int(config.hidden_size),
        heads=int(config.num_attention_heads),
        kv_heads=int(config.num_key_value_heads),
        head_dim=int(attention.head_dim),
        intermediate=max(int(mlp.down.shape[1]) for layer in layers for mlp in layer.mlps),
        vocab=int(head.weight.shape[0]),
        gelu=_ACTIVATIONS[activation],
        eps=float(config.rms_norm_eps),
        embed_scale=float(getattr(config, "embedding_multiplier", 1.0))
        * (1.0 if scale is None else float(scale.to(embedding.weight.dtype))),
        attention_scale=float(attention.scaling),
        residual_scale=float(getattr(config, "residual_multiplier", 1.0)),
        logit_scale=1.0 / float(getattr(config, "logits_scaling", 1.0)),
        norm_offset=1.0 if type(decoder.norm).__name__.startswith("Gemma") else 0.0,
        ropes=ropes,
        layers=layers,
        final_norm=decoder.norm.weight,
        head=head.weight,
        embedding=None if tied else embedding.weight,
    )
    _check(described)
    return described


def kinds_of_layers(config: Any) -> list[tuple[Any, ...]]:
    """Return what a configuration says that tells a decoder's layers apart: equal for those that compute alike."""
    dense, sparse_step = getattr(config, "mlp_only_layers", None) or (), getattr(config, "decoder_sparse_step", 1)
    lists = _by_layer(config).values()
    count = int(config.num_hidden_layers)
    return [(i in dense, (i + 1) % sparse_step == 0, *(values[i] for values in lists)) for i in range(count)]


def first_of_each_kind(config: Any) -> int:
    """Return how many of a decoder's first layers have one of every kind that it has; two at least, if it has two."""
    kinds = kinds_of_layers(config)
    return min(len(kinds), max(2, *(kinds.index(kind) + 1 for kind in kinds)))


def with_layers(config: Any, count: int) -> Any:
    """Return a copy of a decoder's configuration with its first layers alone."""
    shorter = copy.deepcopy(config)
    for name, values in _by_layer(config).items():
        setattr(shorter, name, values[:count])
    shorter.num_hidden_layers = count
    return shorter


def _by_layer(config: Any) -> dict[str, list[Any]]:
    found = {name: getattr(config, name, None) for name in _BY_LAYER}
    return {name: list(values) for name, values in found.items() if values}


def described_layers(d: Description) -> dict[str, AdaptedLayer]:
    """Return what adapters may add to, by its path in the module that was described: a plain text model of a family.

    Not to experts: transformers keeps those of a layer as one tensor.
    """
    query, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    shapes = {
        "self_attn.q_proj": (query, d.hidden),
        "self_attn.k_proj": (kv, d.hidden),
        "self_attn.v_proj": (kv, d.hidden),
        "self_attn.o_proj": (d.hidden, query),
        "mlp.gate_proj": (d.intermediate, d.hidden),
        "mlp.up_proj": (d.intermediate, d.hidden),
        "mlp.down_proj": (d.hidden, d.intermediate),
    }
    return {
        f"model.layers.{layer}.{name}": AdaptedLayer(layer, name, *shape)
        for layer, described in enumerate(d.layers)
        for name, shape in shapes.items()
        if described.router is None or not name.startswith("mlp.")
    }


def _check(d: Description) -> None:
    widths = {int(mlp.down.shape[1]) for layer in d.layers for mlp in layer.mlps}
    if (
        d.hidden % 16
        or d.head_dim % 16
        or any(width % 4 for width in widths)
        or d.head_dim > 512
        or d.heads % d.kv_heads
    ):
        raise NotSupported(f"sizes {d.hidden}, {d.head_dim}, {sorted(widths)}")
    if any(n is not None and n.numel() not in (d.hidden, d.head_dim) for layer in d.layers for n in layer.norms):
        raise NotSupported("norms over all heads together")
    if any(2 * rope.frequencies.numel() != 2 * d.ropes[0].frequencies.numel() for rope in d.ropes):
        raise NotSupported("rotary positions of different sizes")


def _ropes(decoder: Any, config: Any) -> tuple[tuple[Rope, ...], Any]:
    rotary = decoder.rotary_emb
    kinds = rotary.rope_type if isinstance(rotary.rope_type, dict) else {"": rotary.rope_type}
    if odd := sorted(set(kinds.values()) - _ROPES):
        raise NotSupported(f"rotary positions of type {', '.join(odd)}")
    prefixes = [f"{kind}_" if kind else "" for kind in sorted(kinds)]
    ropes = tuple(
        Rope(getattr(rotary, f"{p}inv_freq").float().cpu(), float(getattr(rotary, f"{p}attention_scaling")))
        for p in prefixes
    )
    if len(ropes) == 1:
        return ropes, lambda _: 0
    order = sorted(kinds)
    return ropes, lambda index: order.index(config.layer_types[index])


def _layer(layer: Any, rope: int, config: Any) -> Layer:
    attention = layer.self_attn
    mlps, router = _mlps(layer.mlp, config)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    if hasattr(layer, "pre_feedforward_layernorm"):
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm]
    else:
        norms = [layer.input_layernorm, None, layer.post_attention_layernorm, None]
    norms += [getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)]
    window = attention.sliding_window if hasattr(attention, "sliding_window") else None
    if config.model_type in ("mistral", "ministral", "mixtral") and window is None:
        window = getattr(config, "sliding_window", None)
    return Layer(
        qkv=tuple(p.weight for p in projections),
        out=attention.o_proj.weight,
        mlps=mlps,
        router=router,
        qkv_bias=tuple(p.bias for p in projections if p.bias is not None),
        out_bias=(attention.o_proj.bias,) if attention.o_proj.bias is not None else (),
        norms=tuple(None if n is None else n.weight for n in norms),
        window=int(window or 0),
        rope=_rope_of(attention, rope),
    )


def _rope_of(attention: Any, rope: int) -> int:
    return rope if getattr(attention, "use_rope", True) else -1


def _mlps(mlp: Any, config: Any) -> tuple[tuple[Mlp, ...], Router | None]:
    if not hasattr(mlp, "experts"):
        if any(getattr(m, "bias", None) is not None for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
            raise NotSupported("biases in the MLP")
        return (Mlp((mlp.gate_proj.weight, mlp.up_proj.weight), mlp.down_proj.weight),), None
    both, down = mlp.experts.gate_up_proj.detach(), mlp.experts.down_proj.detach()
    width = down.shape[2]
    mlps = tuple(Mlp((each[:width], each[width:]), back) for each, back in zip(both, down, strict=True))
    normalized = bool(getattr(config, "norm_topk_prob", True))  # Mixtral's always are
    return mlps, Router(mlp.gate.weight, int(config.num_experts_per_tok), normalized)
