"""Whisper's encoder and decoder over rows that come and go. Above: `decoding.py`. Below: transformers' modules.

The encoder is run as transformers defines it. The decoder's layers are transformers' modules, too, driven from here:
rows of a batch stand at different positions, join and leave between steps, and keep their keys and values in memory
that is there from the start. A row's place in that memory is its index; the rows in use are always the first ones.
All beams of a row listen to the same sounds, which are kept and read once; each has tokens of its own, in the places
from `index * num_beams` on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from workers.hearing.packed import pack_layers, packed

# As many of the likeliest tokens get their logits in full precision where the head's are rough.
_REFINED = 32
_LENGTH_STEP = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model: decoder layers, heads, head width, encoder positions, decoder positions, vocabulary, mels."""

    layers: int
    heads: int
    head_width: int
    num_sounds: int
    num_tokens: int
    vocabulary: int
    mels: int

    def values_per_row(self, num_beams: int = 1) -> int:
        """Return how many numbers one row's keys and values take."""
        return 2 * self.layers * self.heads * self.head_width * (self.num_sounds + num_beams * self.num_tokens)


def shape_of(config: Any) -> Shape:
    """Return the sizes that a WhisperConfig tells."""
    return Shape(
        layers=int(config.decoder_layers),
        heads=int(config.decoder_attention_heads),
        head_width=int(config.d_model) // int(config.decoder_attention_heads),
        num_sounds=int(config.max_source_positions),
        num_tokens=int(config.max_target_positions),
        vocabulary=int(config.vocab_size),
        mels=int(config.num_mel_bins),
    )


class Whisper:
    """A loaded model with memory for `num_rows` rows of `num_beams` beams. For one thread.

    Args:
        module: WhisperForConditionalGeneration, on its device. Its encoder and its decoder's linear layers may have
            another dtype than the rest: then what passes between the layers keeps the rest's.
        num_rows: most rows at once.
        num_beams: of each row.
    """

    def __init__(self, module: Any, num_rows: int, num_beams: int = 1) -> None:
        self.shape = shape_of(module.config)
        self.num_rows, self.num_beams = num_rows, num_beams
        self._encoder = module.model.encoder
        self._decoder = module.model.decoder
        self._head = module.proj_out
        weight = self._decoder.embed_tokens.weight
        self.device: torch.device = weight.device
        self.dtype: torch.dtype = self._decoder.layers[0].fc1.weight.dtype
        self._rough_head: Any = None
        if self.dtype != weight.dtype:
            rough = self._head.weight.to(self.dtype)
            self._rough_head = packed(rough, None, num_rows * num_beams) or partial(linear, weight=rough)
            pack_layers(self._decoder.layers, num_rows * num_beams)
        # torch's kernel for attention in bfloat16 on a CPU takes ten times as long as two products.
        self._by_products = self.device.type == "cpu" and self.dtype == torch.bfloat16
        self._encoder_dtype: torch.dtype = self._encoder.conv1.weight.dtype
        shape = self.shape
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        self._sounds = torch.empty(
            (shape.layers, 2, num_rows, shape.heads, shape.num_sounds, shape.head_width), **options
        )
        self._tokens = torch.empty(
            (shape.layers, 2, num_rows * num_beams, shape.heads, shape.num_tokens, shape.head_width), **options
        )
        self._steps = torch.arange(shape.num_tokens, device=self.device)

    def warm_up(self, num_windows: int) -> None:
        """Use all memory that serving will: touch every row, encode as many windows as are encoded at once, and step.

        What a worker is measured to hold after its load is then what it holds.
        """
        self._sounds.zero_()
        self._tokens.zero_()
        frames = 2 * self.shape.num_sounds
        states = self.encode(torch.zeros((num_windows, self.shape.mels, frames)))
        self.hear(0, states[0])
        self.begin(0, [[0]], [0])
        self.step([0] * (self.num_rows * self.num_beams), [1] * self.num_rows)

    @torch.inference_mode()
    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """Return states (windows, num_sounds, width), in the decoder's dtype, of features (windows, mels, frames)."""
        features = features.to(self.device, self._encoder_dtype)
        states: torch.Tensor = self._encoder(features).last_hidden_state
        return states.to(self.dtype)

    @torch.inference_mode()
    def hear(self, row: int, states: torch.Tensor) -> None:
        """Give a row what it listens to: states (num_sounds, width)."""
        # What is masked is multiplied by zero, which a NaN of an earlier window would survive.
        self._tokens[:, :, self._places(row)].zero_()
        for keys_values, layer in zip(self._sounds, self._decoder.layers, strict=True):
            keys_values[0, row] = self._heads(layer.encoder_attn.k_proj(states))
            keys_values[1, row] = self._heads(layer.encoder_attn.v_proj(states))

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Copy a row's memory, all its beams', to another row's place."""
        self._sounds[:, :, target] = self._sounds[:, :, source]
        self._tokens[:, :, self._places(target)] = self._tokens[:, :, self._places(source)]

    @torch.inference_mode()
    def copy(self, sources: Sequence[int], targets: Sequence[int], first: int, last: int) -> None:
        """Copy what beams have read from position `first` to `last` to other beams' places, all at once."""
        self._tokens[:, :, list(targets), :, first:last] = self._tokens[:, :, list(sources), :, first:last]

    def _places(self, row: int) -> slice:
        """Return where a row's beams are."""
        return slice(row * self.num_beams, (row + 1) * self.num_beams)

    @torch.inference_mode()
    def begin(self, first: int, tokens: Sequence[Sequence[int]], at: Sequence[int]) -> torch.Tensor:
        """Read each row's opening tokens, all of one length, into the rows from `first` on, for all their beams.

        Returns:
            (rows, len(at), vocabulary) float32 logits after the tokens at the indices `at`.
        """
        ids = torch.tensor(tokens, device=self.device)
        num_rows, length = ids.shape
        hidden = self._decoder.embed_tokens(ids) + self._decoder.embed_positions.weight[:length]
        rows = slice(first, first + num_rows)
        for index, layer in enumerate(self._decoder.layers):
            attention = layer.self_attn
            states = layer.self_attn_layer_norm(hidden).to(self.dtype)
            keys, values = self._heads(attention.k_proj(states)), self._heads(attention.v_proj(states))
            of_rows = self._tokens[index].view(2, self.num_rows, self.num_beams, *self._tokens.shape[3:])
            of_rows[0, rows, :, :, :length] = keys[:, None]
            of_rows[1, rows, :, :, :length] = values[:, None]
            heard = self._attention(self._heads(attention.q_proj(states)), keys, values, self._past(length))
            hidden = hidden + attention.out_proj(self._joined(heard))
            hidden = self._rest(layer, hidden, self._sounds[index, 0, rows], self._sounds[index, 1, rows])
        return self._logits(hidden[:, list(at)])

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Read one more token of each beam of the first rows.

        Args:
            tokens: the beams' of the first row, those of the second …
            positions: one for each row.

        Returns:
            (rows * beams, vocabulary) float32 logits.
        """
        num_rows = len(positions)
        # In steps: oneDNN compiles and keeps a product for every shape that it meets.
        longest = min(-(-(max(positions) + 1) // _LENGTH_STEP) * _LENGTH_STEP, self.shape.num_tokens)
        ids = torch.tensor(tokens, device=self.device)
        where = torch.tensor([place for place in positions for _ in range(self.num_beams)], device=self.device)
        every = torch.arange(len(tokens), device=self.device)
        seen = (self._steps[:longest] <= where[:, None])[:, None, None, :]
        hidden = self._decoder.embed_tokens(ids) + self._decoder.embed_positions.weight[where]
        # (rows, beams, width) to listen, (rows * beams, 1, width) to attend to what each has said itself.
        hidden = hidden.unflatten(0, (num_rows, self.num_beams))
        for index, layer in enumerate(self._decoder.layers):
            attention = layer.self_attn
            states = layer.self_attn_layer_norm(hidden).to(self.dtype).flatten(0, 1)[:, None]
            own_keys, own_values = self._tokens[index, 0], self._tokens[index, 1]
            own_keys[every, :, where] = self._heads(attention.k_proj(states))[:, :, 0]
            own_values[every, :, where] = self._heads(attention.v_proj(states))[:, :, 0]
            heard = self._attention(
                self._heads(attention.q_proj(states)),
                own_keys[: len(tokens), :, :longest],
                own_values[: len(tokens), :, :longest],
                seen,
            )
            hidden = hidden + attention.out_proj(self._joined(heard)).view_as(hidden)
            hidden = self._rest(layer, hidden, self._sounds[index, 0, :num_rows], self._sounds[index, 1, :num_rows])
        return self._logits(hidden.flatten(0, 1))

    @torch.inference_mode()
    def attend(
        self, row: int, tokens: Sequence[int], heads: Sequence[tuple[int, int]], num_sounds: int
    ) -> torch.Tensor:
        """Return (heads, tokens, num_sounds) float32: how much each (layer, head) listens to what, token by token.

        Only the first `num_sounds` count: the others are the silence that windows are filled up with.

        Overwrites what the row has read; its sounds stay.
        """
        ids = torch.tensor([tokens], device=self.device)
        length = len(tokens)
        hidden = self._decoder.embed_tokens(ids) + self._decoder.embed_positions.weight[:length]
        found: dict[tuple[int, int], torch.Tensor] = {}
        for index, layer in enumerate(self._decoder.layers):
            attention = layer.self_attn
            states = layer.self_attn_layer_norm(hidden).to(self.dtype)
            keys, values = self._heads(attention.k_proj(states)), self._heads(attention.v_proj(states))
            heard = self._attention(self._heads(attention.q_proj(states)), keys, values, self._past(length))
            hidden = hidden + attention.out_proj(self._joined(heard))
            wanted = [pair for pair in heads if pair[0] == index]
            if wanted:
                states = layer.encoder_attn_layer_norm(hidden).to(self.dtype)
                queries = self._heads(layer.encoder_attn.q_proj(states))[0]
                for pair in wanted:
                    scores = queries[pair[1]].float() @ self._sounds[index, 0, row, pair[1], :num_sounds].float().T
                    found[pair] = torch.softmax(scores * self.shape.head_width**-0.5, dim=-1)
            rows = slice(row, row + 1)
            hidden = self._rest(layer, hidden, self._sounds[index, 0, rows], self._sounds[index, 1, rows])
        return torch.stack([found[pair] for pair in heads])

    def _rest(self, layer: Any, hidden: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return hidden (rows, tokens, width) after the layer's listening and its feed-forward part."""
        attention = layer.encoder_attn
        queries = self._heads(attention.q_proj(layer.encoder_attn_layer_norm(hidden).to(self.dtype)))
        hidden = hidden + attention.out_proj(self._joined(self._attention(queries, keys, values)))
        inner = layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden).to(self.dtype)))
        out: torch.Tensor = hidden + layer.fc2(inner)
        return out

    def _attention(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return (rows, heads, queries, head width); `seen` is true where a query may look."""
        if not self._by_products:
            attended: torch.Tensor = scaled_dot_product_attention(queries, keys, values, attn_mask=seen)
            return attended
        scores = (queries * self.shape.head_width**-0.5) @ keys.transpose(-1, -2)
        if seen is not None:
            scores = scores.masked_fill(~seen, float("-inf"))
        mixed: torch.Tensor = scores.softmax(dim=-1) @ values
        return mixed

    def _past(self, length: int) -> torch.Tensor:
        """Return (length, length): true for the tokens up to each one."""
        return self._steps[:length] <= self._steps[:length, None]

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """(…, tokens, width) → (…, heads, tokens, head width)."""
        return states.reshape(*states.shape[:-1], self.shape.heads, self.shape.head_width).transpose(-2, -3)

    def _joined(self, heads: torch.Tensor) -> torch.Tensor:
        """(rows, heads, tokens, head width) → (rows, tokens, width)."""
        return heads.transpose(1, 2).flatten(2)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self._decoder.layer_norm(hidden)
        if self._rough_head is None:
            logits: torch.Tensor = linear(hidden, self._head.weight).float()
            return logits
        logits = self._rough_head(hidden.to(self.dtype)).float()
        # Rounded to bfloat16, neighbours would be equal and logprobs off by some hundredths.
        likeliest = logits.topk(min(_REFINED, logits.shape[-1]), sorted=False).indices
        exact = (self._head.weight[likeliest] @ hidden[..., None])[..., 0]
        return logits.scatter_(-1, likeliest, exact)
