"""A loaded model as one function: token sequences in, vectors or scores out.

Above: the engine's thread. Below: transformers' definitions, `pooling.py`. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from workers.embedding.pooling import pool
from workers.vectors import Vectors


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One input of the model. `type_ids` tell the two texts of a pair apart, where the model knows such types."""

    ids: tuple[int, ...]
    type_ids: tuple[int, ...] = ()


class SequenceModel(Protocol):
    """What the engine runs."""

    @property
    def width(self) -> int:
        """Numbers that come of one sequence."""

    def run(self, sequences: Sequence[TokenSequence]) -> Vectors:
        """Return (sequences, width) float32."""


class EmbeddingModel:
    """A transformer, then pooling, dense layers and normalising.

    Args:
        transformer: returns `last_hidden_state`.
        pooling: modes of `pooling.pool`.
        dense: layers after it, float32, on the transformer's device.
        normalize: vectors get length 1.
        num_prompt_tokens: leading tokens of each sequence that are not pooled.
        pad_id: fills short sequences; masked.
        width: of a vector.
    """

    def __init__(
        self,
        transformer: Any,
        *,
        pooling: Sequence[str],
        dense: Sequence[torch.nn.Module],
        normalize: bool,
        num_prompt_tokens: int,
        pad_id: int,
        width: int,
    ) -> None:
        self._transformer = transformer
        self._pooling = pooling
        self._dense = dense
        self._normalize = normalize
        self._num_prompt_tokens = num_prompt_tokens
        self._pad_id = pad_id
        self.width = width

    @torch.inference_mode()
    def run(self, sequences: Sequence[TokenSequence]) -> Vectors:
        """Return (sequences, width) float32."""
        inputs = padded(sequences, self._pad_id, self._transformer.device)
        hidden = self._transformer(**inputs).last_hidden_state
        vectors = pool(hidden, inputs["attention_mask"], self._pooling, self._num_prompt_tokens)
        for layer in self._dense:
            vectors = layer(vectors)
        if self._normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        array: Vectors = vectors.cpu().numpy()
        return array


class CrossEncoder:
    """A classifier with one label over a query and a document together; its logit becomes a score 0 … 1.

    Args:
        classifier: returns `logits` (batch, 1).
        pad_id: fills short sequences; masked.
    """

    width = 1

    def __init__(self, classifier: Any, *, pad_id: int) -> None:
        self._classifier = classifier
        self._pad_id = pad_id

    @torch.inference_mode()
    def run(self, sequences: Sequence[TokenSequence]) -> Vectors:
        """Return (sequences, 1) float32."""
        inputs = padded(sequences, self._pad_id, self._classifier.device)
        array: Vectors = self._classifier(**inputs).logits.float().sigmoid().cpu().numpy()
        return array


def padded(sequences: Sequence[TokenSequence], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return a model's inputs, each (batch, longest) int64: ids, mask and, where the sequences have them, type ids.

    Padding is on the right, so that every token keeps the position that it has alone.
    """
    shape = (len(sequences), max(len(sequence.ids) for sequence in sequences))
    ids = torch.full(shape, pad_id, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    types = torch.zeros(shape, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        length = len(sequence.ids)
        ids[row, :length] = torch.tensor(sequence.ids)
        mask[row, :length] = 1
        if sequence.type_ids:
            types[row, :length] = torch.tensor(sequence.type_ids)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if sequences[0].type_ids:
        inputs["token_type_ids"] = types
    return {name: tensor.to(device) for name, tensor in inputs.items()}
