"""Tiny image-text models. Above it: fixtures. Below it: `tiny`, torch, transformers, Pillow.

`llava` is trained to name the colour of a picture, half a minute on one CPU thread, so that its answer depends on
what it sees; the others have random weights and serve comparisons with transformers' own `generate`. Each is built
once into the cache of `tiny`. `python -m tests.models.tiny_vision` builds them all.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.kept import kept
from tests.models.tiny import CONTEXT_TOKENS, SPECIAL_TOKENS, VOCABULARY, cache_dir, train_tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

VERSION = "1"
"""Raise it when anything below changes what is built."""

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 40),
    "blue": (30, 50, 220),
    "yellow": (240, 220, 40),
    "black": (10, 10, 10),
    "white": (245, 245, 245),
    "purple": (130, 30, 150),
    "orange": (245, 140, 20),
}
QUESTIONS = ("What colour is this?", "Name the colour.", "Which colour do you see?")
SIDE = 32

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}{{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}{{- IMAGE }}{%- else %}{{- part.text }}{%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

_TILES = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
_EXTRA_TOKENS = {
    "llava": ["<image>"],
    "llava_next": ["<image>"],
    "idefics3": ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *_TILES],
    "smolvlm": ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *_TILES],
    "qwen2_vl": ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"],
    "qwen2_5_vl": ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"],
    "gemma3": ["<image_soft_token>", "<start_of_image>", "<end_of_image>"],
}
_IMAGE = dict.fromkeys(("llava", "llava_next", "idefics3", "smolvlm"), "<image>") | {
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3": "<start_of_image>",
}
_TEXT = {
    "vocab_size": VOCABULARY + 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_TOKENS,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_IMAGE_ID = VOCABULARY  # the first of the extra tokens, for every architecture


def _llava() -> tuple[Any, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
    from transformers import LlamaConfig as Text

    tower = CLIPVisionConfig(**_TOWER, image_size=SIDE, patch_size=8, projection_dim=32)
    config = LlavaConfig(vision_config=tower, text_config=Text(**_TEXT), image_token_id=_IMAGE_ID, image_seq_length=16)
    size = {"height": SIDE, "width": SIDE}
    return LlavaForConditionalGeneration(config), CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size)


def _llava_next() -> tuple[Any, Any]:
    from transformers import (
        CLIPVisionConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
    )
    from transformers import Qwen2Config as Text

    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    tower = CLIPVisionConfig(**_TOWER, image_size=SIDE, patch_size=8, projection_dim=32)
    config = LlavaNextConfig(
        vision_config=tower, text_config=Text(**_TEXT), image_token_id=_IMAGE_ID, image_grid_pinpoints=pinpoints
    )
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaNextImageProcessor(size={"shortest_edge": SIDE}, crop_size=size, image_grid_pinpoints=pinpoints)
    return LlavaNextForConditionalGeneration(config), processor


def _idefics3() -> tuple[Any, Any]:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessor
    from transformers import LlamaConfig as Text

    tower = {**_TOWER, "image_size": SIDE, "patch_size": 8}
    config = Idefics3Config(image_token_id=_IMAGE_ID, vision_config=tower, text_config=Text(**_TEXT), scale_factor=2)
    return Idefics3ForConditionalGeneration(config), Idefics3ImageProcessor(**_tiles())


def _smolvlm() -> tuple[Any, Any]:
    from transformers import LlamaConfig as Text
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessor

    tower = {**_TOWER, "image_size": SIDE, "patch_size": 8}
    config = SmolVLMConfig(image_token_id=_IMAGE_ID, vision_config=tower, text_config=Text(**_TEXT), scale_factor=2)
    return SmolVLMForConditionalGeneration(config), SmolVLMImageProcessor(**_tiles())


def _tiles() -> dict[str, Any]:
    return {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}, "do_image_splitting": True}


_QWEN_TEXT = {**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}


def _qwen2_vl() -> tuple[Any, Any]:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    tower = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=_QWEN_TEXT, vision_config=tower, **_qwen_ids())
    return Qwen2VLForConditionalGeneration(config), Qwen2VLImageProcessor(**_qwen_pixels())


def _qwen2_5_vl() -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor

    tower = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "patch_size": 8}
    tower |= {"intermediate_size": 64, "window_size": 32, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(text_config=_QWEN_TEXT, vision_config=tower, **_qwen_ids())
    return Qwen2_5_VLForConditionalGeneration(config), Qwen2VLImageProcessor(**_qwen_pixels())


def _qwen_ids() -> dict[str, int]:
    names = ("image_token_id", "vision_start_token_id", "vision_end_token_id", "video_token_id")
    return {name: _IMAGE_ID + index for index, name in enumerate(names)}


def _qwen_pixels() -> dict[str, Any]:
    return {"patch_size": 8, "size": {"shortest_edge": SIDE * SIDE, "longest_edge": 8 * SIDE * SIDE}}


def _gemma3() -> tuple[Any, Any]:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessor, SiglipVisionConfig
    from transformers import Gemma3TextConfig as Text

    layers = ["sliding_attention", "full_attention"]
    text = Text(**_TEXT, head_dim=16, sliding_window=32, layer_types=layers, query_pre_attn_scalar=16)
    tower = SiglipVisionConfig(**_TOWER, image_size=SIDE, patch_size=8)
    config = Gemma3Config(
        text_config=text,
        vision_config=tower,
        mm_tokens_per_image=4,
        image_token_id=_IMAGE_ID,
        boi_token_index=_IMAGE_ID + 1,
    )
    return Gemma3ForConditionalGeneration(config), Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE})


ARCHITECTURES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "gemma3": _gemma3,
}


def picture(colour: str, seed: int = 0, width: int = SIDE, height: int = SIDE) -> Image:
    """Return a picture of one colour with some noise."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    pixels = np.array(COLOURS[colour]) + rng.integers(-12, 13, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def noise(seed: int, width: int, height: int) -> Image:
    """Return a picture of random blots."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 5, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def tiny_vision_model(architecture: str = "llava") -> Path:
    """Return the directory of a tiny fp32 image-text model, building it if it is not there yet.

    Raises:
        KeyError: no such architecture; `ARCHITECTURES` has them all.
    """
    place = cache_dir().parent / f"vision-{VERSION}" / f"tiny-{architecture}"
    return kept(place, partial(_save, architecture, ARCHITECTURES[architecture]))


def _save(architecture: str, build: Callable[[], tuple[Any, Any]], directory: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    directory.mkdir()
    _write_tokenizer(architecture, directory)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, image_processor = build()
            image_processor.save_pretrained(directory)
            (directory / "processor_config.json").write_text(json.dumps(_processor_config(architecture)))
            if architecture == "llava":
                _train(model, image_processor, AutoTokenizer.from_pretrained(directory))
            else:
                _randomize(model)
    finally:
        torch.set_num_threads(threads)
    model.generation_config.eos_token_id = [2, 0]
    model.generation_config.pad_token_id = 0
    model.eval().save_pretrained(directory)


def _processor_config(architecture: str) -> dict[str, Any]:
    classes = {"llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor", "idefics3": "Idefics3Processor"}
    classes |= {"smolvlm": "SmolVLMProcessor", "qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}
    config: dict[str, Any] = {"processor_class": classes.get(architecture, "Gemma3Processor")}
    if architecture in ("llava", "llava_next"):
        config |= {"patch_size": 8, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    if architecture in ("idefics3", "smolvlm"):
        config["image_seq_len"] = 4
    return config


def _randomize(model: Any) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers' 0.02 makes every reply one token repeated; biases and norms start without effect.
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(0.0, 0.35 if "embed_tokens" in name or "lm_head" in name else 0.15)


def _write_tokenizer(architecture: str, directory: Path) -> None:
    from tokenizers import AddedToken

    tokenizer = train_tokenizer()
    extra = _EXTRA_TOKENS[architecture]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in extra])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_TOKENS,
        "chat_template": CHAT_TEMPLATE.replace("IMAGE", repr(_IMAGE[architecture])),
    }
    if architecture == "gemma3":
        config |= {"image_token": extra[0], "boi_token": extra[1], "eoi_token": extra[2]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _train(model: Any, image_processor: Any, tokenizer: Any, num_steps: int = 250) -> None:
    """Teach it to name colours: one question, one picture, one word."""
    import torch

    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for step in range(num_steps):
        rows, pixels = [], []
        for index in range(16):
            colour = rng.choice(list(COLOURS))
            image = "<image>" * 16
            question = rng.choice(QUESTIONS)
            asked = rng.choice((image + question, f"{image}\n{question}", question + image))
            text = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
            prompt = tokenizer.encode(text, add_special_tokens=False)
            rows.append((prompt, tokenizer.encode(f"{colour}<|im_end|>", add_special_tokens=False)))
            pixels.append(
                picture(colour, seed=16 * step + index, width=rng.randint(24, 60), height=rng.randint(24, 60))
            )
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.zeros((len(rows), longest), dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        inputs = image_processor(pixels, return_tensors="pt")
        loss = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels, **inputs).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    if loss.item() > 0.1:
        raise RuntimeError(f"the tiny LLaVA did not learn its colours: loss {loss.item():.3f}")


if __name__ == "__main__":
    for each in ARCHITECTURES:
        sys.stdout.write(f"{tiny_vision_model(each)}\n")
