"""What one picture becomes in a prompt's text: its placeholder token many times, perhaps with tokens between.

Above: `vision.py`. Below: transformers' processors, whose own expansion is used where they can be loaded; some of
them (SmolVLM, Qwen2-VL) cannot without a video stack that pictures do not need.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoProcessor, Idefics3Processor


class PictureText(Protocol):
    """How one architecture writes a picture. Above: `Vision`; below: a processor of transformers."""

    def options(self, *, low_detail: bool) -> Mapping[str, Any]:
        """Return what the image processor must be told."""

    def of(self, inputs: Any) -> str:
        """Return the text for the one picture that an image processor made `inputs` of."""


def picture_text(config: Any, image_processor: Any, tokenizer: Any, path: Path, token: str) -> PictureText:
    """Return the writer for a model.

    Args:
        config: the model's.
        image_processor, tokenizer: loaded from `path`.
        token: the placeholder.
    """
    if config.model_type in ("idefics3", "smolvlm"):
        return _Tiled(config, image_processor, tokenizer)
    if config.model_type in ("qwen2_vl", "qwen2_5_vl"):
        return _Merged(token, image_processor.merge_size**2)
    return _Patched(config, path)


class _Patched:
    """LLaVA and LLaVA-NeXT."""

    def __init__(self, config: Any, path: Path) -> None:
        self._processor: Any = AutoProcessor.from_pretrained(path, local_files_only=True)  # type: ignore[no-untyped-call]
        # Older checkpoints leave these to the model's configuration.
        if self._processor.patch_size is None:
            self._processor.patch_size = config.vision_config.patch_size
            class_token = config.vision_config.model_type == "clip_vision_model"
            self._processor.num_additional_image_tokens = int(class_token)
        if self._processor.vision_feature_select_strategy is None:
            self._processor.vision_feature_select_strategy = config.vision_feature_select_strategy

    def options(self, *, low_detail: bool) -> Mapping[str, Any]:
        return {}

    def of(self, inputs: Any) -> str:
        return str(self._processor.replace_image_token(inputs, 0))


class _Tiled:
    """Idefics3 and SmolVLM: the picture whole and, unless little detail will do, in numbered tiles."""

    def __init__(self, config: Any, image_processor: Any, tokenizer: Any) -> None:
        vision = config.vision_config
        num_tokens = (vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2
        # SmolVLM's processor writes the same.
        self._processor = Idefics3Processor(image_processor, tokenizer, image_seq_len=num_tokens)

    def options(self, *, low_detail: bool) -> Mapping[str, Any]:
        return {"return_row_col_info": True} | ({"do_image_splitting": False} if low_detail else {})

    def of(self, inputs: Any) -> str:
        return str(self._processor.replace_image_token(inputs, 0))


class _Merged:
    """Qwen2-VL and Qwen2.5-VL: one token for each square of `patches_per_token` patches."""

    def __init__(self, token: str, patches_per_token: int) -> None:
        self._token = token
        self._patches_per_token = patches_per_token

    def options(self, *, low_detail: bool) -> Mapping[str, Any]:
        return {}

    def of(self, inputs: Any) -> str:
        return self._token * (int(inputs["image_grid_thw"][0].prod()) // self._patches_per_token)
