"""The kernels' C interface as a Python object: pack a described model, run steps. Knows ctypes and numpy, no scheduler.

Above: `runner.py`. Below: `decoder.cpp`, whose structures the ones here mirror field by field.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad

from workers.text.adapters import Adapter
from workers.text.describe import Description

KINDS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
STAGES = ("linear", "attention", "head", "other")
_QKV, _OUT, _GATE_UP, _DOWN, _ROUTER, _FIRST_EXPERT = range(6)
_HEAD, _EMBEDDING = 0, 1
_GROUP = 32
_PANEL = 16  # outputs that stand together in a packed weight

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


class _Config(c.Structure):
    _fields_ = (
        *((n, c.c_int32) for n in ("layers", "hidden", "heads", "kv_heads", "head_dim", "rotary_dim", "intermediate")),
        *((n, c.c_int32) for n in ("vocab", "gelu", "cache_kind", "threads")),
        ("blocks", c.c_int64),
        *((n, c.c_float) for n in ("eps", "embed_scale", "attention_scale", "residual_scale", "logit_scale")),
    )


class _Step(c.Structure):
    _fields_ = (
        *((n, c.c_int32) for n in ("rows", "sequences", "logit_rows", "overrides", "table_stride", "threads")),
        *((n, c.c_void_p) for n in ("tokens", "sequence", "tables", "cosines", "sines", "logit_row", "logits")),
        *((n, c.c_void_p) for n in ("override_row", "override_value", "adapter")),
    )


def _load(path: Path) -> Any:
    library = c.CDLL(str(path))
    pointer, number = c.c_void_p, c.c_int
    library.hostler_model_new.argtypes, library.hostler_model_new.restype = [pointer], pointer
    library.hostler_model_free.argtypes = [pointer]
    library.hostler_set_weight.argtypes = [pointer, number, number, number, number, pointer, pointer, *([number] * 3)]
    library.hostler_set_bias.argtypes = [pointer, number, number, pointer, number]
    library.hostler_set_vector.argtypes = [pointer, number, number, pointer, number]
    library.hostler_set_experts.argtypes = [pointer, *([number] * 4)]
    library.hostler_set_layer.argtypes = [pointer, number, number, number]
    library.hostler_add_low_rank.argtypes = [pointer, *([number] * 3), pointer, pointer, *([number] * 5)]
    library.hostler_step.argtypes = [pointer, pointer]
    library.hostler_rest.argtypes = [pointer]
    library.hostler_resize.argtypes = [pointer, c.c_int64, number, pointer, pointer]
    library.hostler_seconds.argtypes = [pointer, pointer]
    library.hostler_weight_bytes.argtypes, library.hostler_weight_bytes.restype = [pointer], c.c_int64
    return library


def _places(model: Description) -> dict[str, tuple[int, int, int]]:
    """Where a linear layer's outputs lie in the packed products: which product, first panel, panels to the next."""
    query, kv = model.heads * model.head_dim // _PANEL, model.kv_heads * model.head_dim // _PANEL
    return {
        "self_attn.q_proj": (_QKV, 0, 1),
        "self_attn.k_proj": (_QKV, query, 1),
        "self_attn.v_proj": (_QKV, query + kv, 1),
        "self_attn.o_proj": (_OUT, 0, 1),
        "mlp.gate_proj": (_GATE_UP, 0, 2),
        "mlp.up_proj": (_GATE_UP, 1, 2),
        "mlp.down_proj": (_DOWN, 0, 1),
    }


class NativeDecoder:
    """A packed model and its cache. Used by one thread at a time; a step releases the interpreter lock.

    Args:
        library: the compiled kernels.
        model: what to pack; its tensors may be freed afterwards.
        weights: "float32", "bfloat16", "int8" or "int4".
        cache: "float32" or "bfloat16", of keys and values.
        num_blocks: blocks of 16 positions that the cache may have; memory is committed as they are written.
        num_threads: most threads of a step.
        capacity_blocks: to how many `resize` can bring it, where the system gives so much address space.

    Raises:
        MemoryError: no room for the weights.
    """

    def __init__(
        self, library: Path, model: Description, *, weights: str, cache: str, num_blocks: int, num_threads: int,
        capacity_blocks: int = 0,
    ) -> None:  # fmt: skip
        self._library = _load(library)
        self._vocab, self._ropes = model.vocab, model.ropes
        self._places = _places(model)
        self._frequencies = [rope.frequencies.numpy() for rope in model.ropes]
        config = _Config(
            layers=len(model.layers), hidden=model.hidden, heads=model.heads, kv_heads=model.kv_heads,
            head_dim=model.head_dim, rotary_dim=2 * self._frequencies[0].size, intermediate=model.intermediate,
            vocab=model.vocab, gelu=model.gelu, cache_kind=KINDS[cache], threads=num_threads,
            blocks=max(num_blocks, capacity_blocks),
            eps=model.eps, embed_scale=model.embed_scale, attention_scale=model.attention_scale,
            residual_scale=model.residual_scale, logit_scale=model.logit_scale,
        )  # fmt: skip
        self._model = self._library.hostler_model_new(c.byref(config))
        if not self._model and capacity_blocks > num_blocks:
            config.blocks = num_blocks
            self._model = self._library.hostler_model_new(c.byref(config))
        if not self._model:
            raise MemoryError("the cache's address space could not be reserved")
        try:
            self._pack(model, weights)
        except BaseException:
            self.close()
            raise

    def _pack(self, model: Description, kind: str) -> None:
        for index, layer in enumerate(model.layers):
            self._weight(index, _QKV, kind, layer.qkv)
            self._weight(index, _OUT, kind, (layer.out,))
            places = (_GATE_UP, _DOWN)
            if (router := layer.router) is not None:
                self._library.hostler_set_experts(self._model, index, len(layer.mlps), router.chosen, router.normalized)
                # Rounded scores would choose other experts.
                self._weight(index, _ROUTER, "float32", (router.weight,))
                places = (_FIRST_EXPERT, _FIRST_EXPERT + 1)
            for expert, mlp in enumerate(layer.mlps):
                gate_up, down = (place + 2 * expert for place in places)
                self._weight(index, gate_up, kind, mlp.gate_up, interleave=True)
                self._weight(index, down, kind, (mlp.down,))
            for which, biases in ((_QKV, layer.qkv_bias), (_OUT, layer.out_bias)):
                if biases:
                    values = torch.cat([b.detach().float() for b in biases]).numpy()
                    self._done(
                        self._library.hostler_set_bias(self._model, index, which, values.ctypes.data, values.size)
                    )
            for which, norm in enumerate(layer.norms):
                if norm is not None:
                    self._vector(index, which, norm.float() + model.norm_offset)
            self._library.hostler_set_layer(self._model, index, layer.window, layer.rope)
        self._vector(-1, 0, model.final_norm.float() + model.norm_offset)
        # Half bytes cost the head and the embedding too much: they stay at a byte.
        outer = "int8" if kind == "int4" else kind
        self._weight(-1, _HEAD, outer, (model.head,))
        if model.embedding is not None:
            self._weight(-1, _EMBEDDING, outer, (model.embedding,))

    def _weight(
        self, layer: int, which: int, kind: str, tensors: Sequence[torch.Tensor], *, interleave: bool = False
    ) -> None:
        parts = [t.detach().contiguous() for t in tensors]
        if parts[0].dtype not in (torch.float32, torch.bfloat16):
            parts = [t.float() for t in parts]
        inputs = int(parts[0].shape[1])
        if kind == "int4" and inputs % _GROUP:
            kind = "int8"
        pointers = (c.c_void_p * len(parts))(*(t.data_ptr() for t in parts))
        rows = (c.c_int32 * len(parts))(*(t.shape[0] for t in parts))
        is_bf16 = parts[0].dtype == torch.bfloat16
        self._done(
            self._library.hostler_set_weight(
                self._model, layer, which, KINDS[kind], len(parts), pointers, rows, inputs, is_bf16, interleave
            )
        )

    def _vector(self, layer: int, which: int, values: torch.Tensor) -> None:
        array = values.detach().float().contiguous().numpy()
        self._library.hostler_set_vector(self._model, layer, which, array.ctypes.data, array.size)

    def add_adapter(self, index: int, adapter: Adapter) -> None:
        """Pack an adapter; its tensors may be freed afterwards. `step` then takes `index` for it.

        Raises:
            MemoryError: no room for it.
        """
        for (layer, name), delta in adapter.deltas.items():
            which, panel, panel_step = self._places[name]
            padding = -delta.rank % _PANEL
            down = pad(delta.down.float(), (0, 0, 0, padding)).contiguous()
            up = pad(delta.up.float() * delta.scale, (0, padding)).contiguous()
            self._done(
                self._library.hostler_add_low_rank(
                    self._model, index, layer, which, down.data_ptr(), up.data_ptr(), delta.rank + padding,
                    down.shape[1], up.shape[0], panel, panel_step,
                )
            )  # fmt: skip

    @staticmethod
    def _done(status: int) -> None:
        if status:
            raise MemoryError("the kernels ran out of memory")

    def step(
        self, *, tokens: Ints, positions: Ints, sequences: Ints, tables: Ints, logit_rows: Ints, num_threads: int,
        override_rows: Ints | None = None, overrides: Floats | None = None, adapters: Ints | None = None,
    ) -> Floats:  # fmt: skip
        """Run one step: write keys and values of every row, return logits of some.

        Args:
            tokens: (rows,) ids.
            positions: (rows,) of each.
            sequences: (sequences, 4): first row, number of rows, position of the first, index of its table.
            tables: (tables, stride) block indices of each sequence, in order.
            logit_rows: (wanted,) rows whose logits are wanted.
            num_threads: threads that take part.
            override_rows: rows whose embedding is given in `overrides` (n, hidden) instead of looked up.
            adapters: (sequences,) index of each one's adapter, -1 for none.

        Returns:
            (wanted, vocab) logits.

        Raises:
            MemoryError: no room for the step's activations.
        """
        logits = np.empty((logit_rows.size, self._vocab), np.float32)
        cosines, sines = [], []
        for rope, frequencies in zip(self._ropes, self._frequencies, strict=True):
            angles = positions.astype(np.float32)[:, None] * frequencies
            cosines.append(np.cos(angles) * np.float32(rope.scaling))
            sines.append(np.sin(angles) * np.float32(rope.scaling))
        pointers = c.c_void_p * len(cosines)
        cosine_pointers = pointers(*(a.ctypes.data for a in cosines))
        sine_pointers = pointers(*(a.ctypes.data for a in sines))
        step = _Step(
            rows=tokens.size, sequences=len(sequences), logit_rows=logit_rows.size,
            overrides=0 if override_rows is None else override_rows.size, table_stride=tables.shape[1],
            threads=num_threads, tokens=tokens.ctypes.data, sequence=sequences.ctypes.data, tables=tables.ctypes.data,
            cosines=c.cast(cosine_pointers, c.c_void_p), sines=c.cast(sine_pointers, c.c_void_p),
            logit_row=logit_rows.ctypes.data, logits=logits.ctypes.data,
            override_row=None if override_rows is None else override_rows.ctypes.data,
            override_value=None if overrides is None else overrides.ctypes.data,
            adapter=None if adapters is None else adapters.ctypes.data,
        )  # fmt: skip
        self._done(self._library.hostler_step(self._model, c.byref(step)))
        return logits

    def resize(self, num_blocks: int, moved: Mapping[int, int]) -> None:
        """Have so many blocks; contents of moved ones go from old to new index, memory beyond the end is freed.

        Raises:
            MemoryError: no address space for so many.
        """
        count = c.c_int64 * len(moved)
        old, new = count(*moved), count(*moved.values())
        self._done(self._library.hostler_resize(self._model, num_blocks, len(moved), old, new))

    def rest(self) -> None:
        """End the threads. The next step starts its own, with its caller's priority instead of the load's."""
        self._library.hostler_rest(self._model)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weights: what a step of one row reads."""
        return int(self._library.hostler_weight_bytes(self._model))

    def seconds(self) -> dict[str, float]:
        """Return the seconds that steps spent in each of `STAGES` since the last call."""
        values = np.zeros(len(STAGES))
        self._library.hostler_seconds(self._model, values.ctypes.data)
        return dict(zip(STAGES, values.tolist(), strict=True))

    def close(self) -> None:
        """Free weights and cache; no other call may follow."""
        model, self._model = getattr(self, "_model", None), None
        if model:
            self._library.hostler_model_free(model)

    def __del__(self) -> None:
        """Free what was never served, whoever gave it up on the way."""
        self.close()
