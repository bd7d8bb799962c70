"""Models with real shapes and random weights: built once for a run, as safetensors with a tokenizer, in its folder.

Above: the steps that measure a model. Below: transformers for names and shapes, torch for the numbers, safetensors.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .found import NotRun, Setting, say

_SHARD_BYTES = 4 * 10**9
_ITEM_BYTES = 2
_WEIGHT_SCALE = 0.02
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's dimensions."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    context: int = 8192
    tied: bool = False

    @property
    def head_dim(self) -> int:
        """Of each head."""
        return self.hidden // self.heads

    @property
    def num_parameters(self) -> int:
        """All of them, embeddings included."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * self.head_dim
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + (1 if self.tied else 2) * self.vocab * self.hidden + self.hidden

    @property
    def weight_bytes(self) -> int:
        """In bfloat16."""
        return self.num_parameters * _ITEM_BYTES

    @property
    def kv_bytes_per_token(self) -> int:
        """In bfloat16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * _ITEM_BYTES


LLAMA_8B = Shape("8B (Llama-3.1-8B's shape)", 4096, 32, 32, 8, 14336, 128256)
LLAMA_3B = Shape("3B (Llama-3.2-3B's shape)", 3072, 28, 24, 8, 8192, 128256, tied=True)
SHARER = Shape("0.6B (for sharing)", 2048, 8, 16, 8, 8192, 32000)
SMALL = Shape("small", 64, 2, 4, 2, 128, 1024, context=512)


@dataclass(frozen=True, slots=True)
class Room:
    """Free bytes: where the files go, of the host's memory, of the device's."""

    disk: int
    host: int
    device: int


def fits(shape: Shape, room: Room) -> bool:
    """Whether a shape can be measured: files, their cached pages and a sleeper's copy, weights and caches."""
    weights = shape.weight_bytes
    return (
        room.disk > weights * 1.05 + 2 * 10**9 and room.host > 2.5 * weights and room.device > 1.5 * weights + 4 * 10**9
    )


def chosen_shape(setting: Setting) -> Shape:
    """Return the shape that this run measures: the largest that fits.

    Raises:
        NotRun: none does.
    """
    if setting.small:
        shape = SMALL
    else:
        folder = model_folder(setting)
        # What was built already needs no more room, but for its own choice of shape.
        done = next((s for s in (LLAMA_8B, LLAMA_3B) if _is_built(folder, _cut(s, setting))), None)
        room = measured_room(setting)
        found = done or next((s for s in (LLAMA_8B, LLAMA_3B) if fits(_cut(s, setting), room)), None)
        if found is None:
            gigabytes = [f"{free / 1e9:.0f} GB of {where}" for where, free in _named(room)]
            raise NotRun(f"no model fits: there are {', '.join(gigabytes)} free")
        shape = found
    return _cut(shape, setting)


def _named(room: Room) -> tuple[tuple[str, int], ...]:
    return ("disk", room.disk), ("host memory", room.host), ("device memory", room.device)


def _cut(shape: Shape, setting: Setting) -> Shape:
    if not setting.layers or setting.layers == shape.layers:
        return shape
    return replace(shape, name=f"{shape.name} cut to {setting.layers} layers", layers=setting.layers)


def measured_room(setting: Setting) -> Room:
    """Return what is free now."""
    import psutil
    import torch

    host = int(psutil.virtual_memory().available)
    device = int(torch.cuda.mem_get_info(setting.device)[0]) if setting.is_cuda else host
    return Room(shutil.disk_usage(setting.folder).free, host, device)


def model_folder(setting: Setting) -> Path:
    """Return where the measured model lies, or will."""
    return Path(setting.folder) / "model"


def _is_built(folder: Path, shape: Shape) -> bool:
    stamp = folder / "built"
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == repr(shape)


def build(shape: Shape, folder: Path, device: str) -> Path:
    """Return the folder of a model of `shape`, with weights made on `device`, building it if it is not there."""
    if _is_built(folder, shape):
        return folder
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = _config(shape)
    assert isinstance(config, LlamaConfig)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}  # tied ones once
    generator = torch.Generator(device).manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    pending_bytes = num_files = done_bytes = 0

    def write() -> None:
        nonlocal shard, pending_bytes, num_files, done_bytes
        num_files += 1
        name = f"model-{num_files:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        done_bytes += pending_bytes
        say(f"  wrote {done_bytes / 1e9:.1f} of {shape.weight_bytes / 1e9:.1f} GB of weights")
        shard, pending_bytes = {}, 0

    for name, size in shapes.items():
        if name.endswith("norm.weight"):
            tensor = torch.ones(size, dtype=torch.bfloat16)
        else:
            drawn = torch.empty(size, dtype=torch.bfloat16, device=device)
            tensor = drawn.normal_(0.0, _WEIGHT_SCALE, generator=generator).cpu()
        shard[name] = tensor
        pending_bytes += tensor.numel() * _ITEM_BYTES
        if pending_bytes >= _SHARD_BYTES:
            write()
    if shard:
        write()
    index = {"metadata": {"total_size": done_bytes}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(folder)
    write_tokenizer(folder, shape.vocab)
    (folder / "built").write_text(repr(shape), encoding="utf-8")
    return folder


def _config(shape: Shape) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a byte-level tokenizer in which every id of the vocabulary stands for some text.

    It merges nothing, so that text is read as bytes; but what a model with random weights says is text, as it is with a
    trained one, and costs as much to tell.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [f"Ġw{number}" for number in range(vocab_size - len(pieces))]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
