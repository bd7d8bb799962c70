"""Pictures for image-text models: decode, process, run the vision tower, and place the rows in the prompt.

Above: `engine.py` (its vision thread), `loader.py`. Below: `images.py`, transformers' image processors and the
model's own `get_image_features`. A picture passes in two halves, so that a prompt that does not fit is refused before
the tower runs:

    read    bytes → pixels → the text that its placeholder becomes in the prompt
    place   rows of the tower and projector → `EmbeddingSpan`s at the placeholder tokens of the encoded prompt

Which architectures are served is a list, not a guess: each was compared with transformers' own `generate`.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from hostler.errors import InvalidRequest
from transformers import AutoImageProcessor, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from workers.engine import ImageInput
from workers.text import images
from workers.text.embeddings import EmbeddingSpan, PromptExtras, RopePositions
from workers.text.picture_text import picture_text

_TOWER_ATTENTION = "sdpa"
_CACHE_BYTES = 256 * 2**20
_NOT_FOR_THE_MODEL = ("rows", "cols")
_ONE_DIMENSIONAL = {"llava", "llava_next", "idefics3", "smolvlm"}
_THREE_DIMENSIONAL = {"qwen2_vl", "qwen2_5_vl"}
# Towers of LLaVA whose features are as many as their patches; others (Pixtral) pack rows in ways of their own.
_LLAVA_TOWERS = {"clip_vision_model", "siglip_vision_model"}


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that was read.

    Attributes:
        content_hash: of its bytes and of how it was read.
        text: what its placeholder becomes in the prompt.
        inputs: for the tower; empty when its rows are in the cache.
        grid: (3,) int64 patches in time, height, width; None for models that place all tokens in one dimension.
    """

    content_hash: bytes
    text: str
    inputs: Mapping[str, torch.Tensor]
    grid: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Seen:
    text: str
    grid: torch.Tensor | None
    rows: torch.Tensor


def is_image_text(config: Any) -> bool:
    """Tell whether a model's configuration is of a kind that transformers loads as image and text to text.

    Those with an encoder of text are not: their language model is not one that continues a prompt.
    """
    has_both = hasattr(config, "vision_config") and hasattr(config, "text_config")
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and has_both and not config.is_encoder_decoder


def serves_images(config: Any) -> bool:
    """Tell whether images of this architecture are served, not only its text.

    Not served: models whose image tokens attend to later ones (Gemma 3), and those that add image features in deeper
    layers (Qwen3-VL).
    """
    kind = config.model_type
    if kind in ("llava", "llava_next"):
        return config.vision_config.model_type in _LLAVA_TOWERS
    return is_image_text(config) and kind in _ONE_DIMENSIONAL | _THREE_DIMENSIONAL


def load_model(path: Path, attention: str, **options: Any) -> Any:
    """Load an image-text model: `attention` in its language model, torch's own in the tower."""
    config = options["config"]
    parts = {"": attention} | {
        name: attention if name == "text_config" else _TOWER_ATTENTION for name in type(config).sub_configs
    }
    return AutoModelForImageTextToText.from_pretrained(path, attn_implementation=parts, **options)


class Vision:
    """The eyes of one loaded model. For one thread at a time.

    Args:
        model: the transformers module on its device.
        tokenizer: its tokenizer; takes over the processor's chat template, if the directory has one apart.
        path: the model's directory.

    Raises:
        OSError, ValueError, ImportError: the directory's image processor cannot be used.
    """

    def __init__(self, model: Any, tokenizer: Any, path: Path) -> None:
        self._model = model
        self._config = model.config
        self._processor: Any = AutoImageProcessor.from_pretrained(path, local_files_only=True)  # type: ignore[no-untyped-call]
        self.token_id = int(getattr(self._config, "image_token_id", None) or self._config.image_token_index)
        self.token = str(tokenizer.convert_ids_to_tokens(self.token_id))
        self._text = picture_text(self._config, self._processor, tokenizer, path, self.token)
        self._seen: OrderedDict[bytes, _Seen] = OrderedDict()
        self._seen_bytes = 0
        apart = path / "chat_template.json"
        if apart.is_file():
            tokenizer.chat_template = json.loads(apart.read_text(encoding="utf-8"))["chat_template"]

    def forget(self) -> None:
        """Drop what was seen; pictures that come again are looked at again."""
        self._seen.clear()
        self._seen_bytes = 0

    @property
    def has_three_dimensions(self) -> bool:
        """Whether its prompts have rotary positions in time, height and width."""
        return self._config.model_type in _THREE_DIMENSIONAL

    def read(self, pictures: Sequence[ImageInput]) -> list[Picture]:
        """Decode and process pictures; those seen lately are not decoded again.

        Raises:
            InvalidRequest: one is broken, too large, or of a shape that the model's processor refuses.
        """
        return [self._read(picture) for picture in pictures]

    def _read(self, picture: ImageInput) -> Picture:
        low = picture.detail == "low"
        content_hash = hashlib.blake2b(picture.data, digest_size=16, person=b"low" if low else b"full").digest()
        if (seen := self._seen.get(content_hash)) is not None:
            return Picture(content_hash, seen.text, {}, seen.grid)
        image = images.decode(picture.data, low_detail=low)
        try:
            inputs = self._processor(image, return_tensors="pt", **self._text.options(low_detail=low))
        except ValueError:
            raise InvalidRequest(
                f"An image of {image.width} × {image.height} pixels has a shape that this model does not take.",
                param="messages",
            ) from None
        grid = inputs["image_grid_thw"][0] if self._config.model_type in _THREE_DIMENSIONAL else None
        text = self._text.of(inputs)
        tensors = {name: value for name, value in inputs.items() if name not in _NOT_FOR_THE_MODEL}
        return Picture(content_hash, text, tensors, grid)

    def place(self, ids: Sequence[int], pictures: Sequence[Picture]) -> PromptExtras:
        """Run the tower on pictures and say where in the prompt their rows go.

        Args:
            ids: the encoded prompt, with as many placeholder tokens as the pictures' texts hold.
            pictures: in the order of the prompt.
        """
        tokens = torch.tensor(ids, dtype=torch.long)
        places = (tokens == self.token_id).nonzero()[:, 0].tolist()
        spans: list[EmbeddingSpan] = []
        done = 0
        for picture in pictures:
            rows = self._rows(picture)
            spans += _spans(places[done : done + rows.shape[0]], rows, picture.content_hash)
            done += rows.shape[0]
        if done != len(places):
            raise RuntimeError(f"{len(places)} image tokens in the prompt, but {done} rows from the vision tower")
        return PromptExtras(tuple(spans), self._rope(tokens, pictures))

    @torch.inference_mode()
    def _rows(self, picture: Picture) -> torch.Tensor:
        """Return (n, hidden) in the model's dtype, from the cache or the tower."""
        if (seen := self._seen.get(picture.content_hash)) is not None:
            self._seen.move_to_end(picture.content_hash)
            return seen.rows
        embeddings = self._model.get_input_embeddings().weight
        inputs = {
            name: value.to(embeddings.device, embeddings.dtype if value.is_floating_point() else value.dtype)
            for name, value in picture.inputs.items()
        }
        features = self._model.get_image_features(**inputs).pooler_output
        if not isinstance(features, torch.Tensor):
            features = torch.cat(list(features))
        rows = features.reshape(-1, features.shape[-1]).to(embeddings.dtype)
        self._remember(picture, rows)
        return rows

    def _remember(self, picture: Picture, rows: torch.Tensor) -> None:
        self._seen[picture.content_hash] = _Seen(picture.text, picture.grid, rows)
        self._seen_bytes += rows.nbytes
        while self._seen_bytes > _CACHE_BYTES and len(self._seen) > 1:
            _, oldest = self._seen.popitem(last=False)
            self._seen_bytes -= oldest.rows.nbytes

    def _rope(self, tokens: torch.Tensor, pictures: Sequence[Picture]) -> RopePositions | None:
        grids = [picture.grid for picture in pictures if picture.grid is not None]
        if not grids:
            return None
        positions, offset = self._model.model.get_rope_index(
            tokens[None], mm_token_type_ids=(tokens[None] == self.token_id).int(), image_grid_thw=torch.stack(grids)
        )
        return RopePositions(positions[:, 0], int(offset))


def _spans(places: Sequence[int], rows: torch.Tensor, content_hash: bytes) -> list[EmbeddingSpan]:
    """Cut one picture's rows where its places are not adjacent."""
    if len(places) != rows.shape[0]:
        raise RuntimeError(f"{rows.shape[0]} rows from the vision tower, but only {len(places)} image tokens for them")
    cuts = [0, *(i for i in range(1, len(places)) if places[i] != places[i - 1] + 1), len(places)]
    return [
        EmbeddingSpan(places[a], rows[a:b], hashlib.blake2b(content_hash + a.to_bytes(4), digest_size=16).digest())
        for a, b in pairwise(cuts)
        if a < b
    ]
