"""Compiles every kernel of a decode step for the cards that people have, as it is launched there. Needs no card.

`python -m tests.workers.triton_checks.compiling`, without TRITON_INTERPRET: the interpreter takes much that a compiler
refuses. A step of a small model runs with kernels that, instead of computing, are compiled for the arguments that they
are given; the assembler then tells what a processor would lack.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from workers.text.attention import PagedCache
from workers.text.gpu import kernels, narrow, paged_attention
from workers.text.gpu.fused import fuse
from workers.text.gpu.layout import Layout
from workers.text.kv_cache import KVShape
from workers.text.linear import QuantizedLinear, quantize

# A100, RTX 30, RTX 40, H100 and H200, RTX 50.
ARCHITECTURES = (80, 86, 89, 90, 120)
KERNELS = ((kernels, "_add_norm"), (kernels, "_rotate_and_keep"), (kernels, "_gate"), (narrow, "_product"))
KERNELS += tuple((paged_attention, name) for name in ("_attend_singles", "_join", "_attend_tiles"))
MOST_ON_STACK = 128
"""Bytes: a few registers of a kernel that takes nearly all there are."""
_OPTIONS = ("num_warps", "num_stages")
_TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32", torch.int8: "i8"}


class Compiled:
    """Stands for a kernel: a launch compiles it, once for each kind of arguments."""

    def __init__(self, kernel: Any, architecture: int) -> None:
        self._kernel = kernel
        self._architecture = architecture
        self.bytes_on_stack: dict[str, int] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(0 < size < 2**31 for size in grid)
        return self._launch

    def _launch(self, *args: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in _OPTIONS if name in named}
        given = dict(zip(self._kernel.arg_names, args, strict=False)) | named
        assert set(given) == set(self._kernel.arg_names), "as many as the kernel takes"
        # As a launch tells the compiler more of its arguments than their types.
        told = {name: value for name, value in given.items() if name not in self._kernel.do_not_specialize}
        constants = {name: value for name, value in told.items() if name.isupper() or _is_one(value)}
        hints = {
            (self._kernel.arg_names.index(name),): [["tt.divisibility", 16]]
            for name, value in told.items()
            if name not in constants and _is_even(value)
        }
        signature = {name: "constexpr" if name in constants else _type(value) for name, value in given.items()}
        key = f"{signature} {constants}"
        if key not in self.bytes_on_stack:
            source = ASTSource(self._kernel, signature, constants, hints)
            made = triton.compile(source, target=GPUTarget("cuda", self._architecture, 32), options=options)
            self.bytes_on_stack[key] = on_stack(made.asm["cubin"])
            assert made.metadata.shared <= 99 * 1024, "shared memory that each of these cards has"


def _is_one(value: Any) -> bool:
    return type(value) is int and value == 1


def _is_even(value: Any) -> bool:
    """Whether a launch would find that 16 divides an address or a number."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return type(value) is int and value % 16 == 0


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def on_stack(cubin: bytes) -> int:
    """Return how many bytes of each thread did not fit into registers, by the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    (found,) = re.findall(r"STACK:(\d+)", done.stdout + done.stderr)
    return int(found)


def models() -> list[Any]:
    """Small ones that between them launch every kernel in each of its ways."""
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    windowed = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
    return [
        LlamaForCausalLM(LlamaConfig(**sizes, head_dim=128)),
        LlamaForCausalLM(LlamaConfig(**sizes, head_dim=64)),
        LlamaForCausalLM(LlamaConfig(**sizes | {"num_key_value_heads": 1}, head_dim=128)),
        LlamaForCausalLM(LlamaConfig(**sizes | {"num_key_value_heads": 8}, head_dim=80)),
        Gemma3ForCausalLM(Gemma3TextConfig(**sizes, head_dim=256, **windowed)),
        *(quantized(LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True)), kind) for kind in ("int8", "int4")),
    ]


def quantized(model: Any, kind: str) -> Any:
    quantize(model.to(torch.bfloat16).model, kind)
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            layer.few_rows, layer.most_rows = narrow.product, narrow.MOST_ROWS
    return model


def step(model: Any, rows: int) -> torch.Tensor:
    """Run a step of as many sequences that decode, and the prompt of one more; few are cut into parts, many are not."""
    config = model.config
    cpu = torch.device("cpu")
    shape = KVShape(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, 4 * (rows + 1), 64)
    tables = torch.arange(4 * (rows + 1), dtype=torch.int32).reshape(rows + 1, 4)
    layout = Layout(
        cache=PagedCache(shape, torch.bfloat16, cpu),
        places=torch.cat((tables[:rows, 2].long() * 16 + 8, tables[rows, 0].long() * 16 + torch.arange(20))),
        positions=torch.cat((torch.full((rows,), 40), torch.arange(20))),
        tables=tables,
        num_singles=rows,
        splits=paged_attention.splits_for(rows, config.num_key_value_heads, 132),
        tiles=torch.tensor([[rows, 16, 0, rows], [rows + 16, 4, 16, rows]], dtype=torch.int32),
    )
    decoder = fuse(model.get_decoder(), model.get_output_embeddings(), config)
    assert decoder is not None
    return decoder(torch.zeros(rows + 20, dtype=torch.long), layout)


def main() -> None:
    for architecture in ARCHITECTURES:
        stand_ins = {name: Compiled(getattr(module, name), architecture) for module, name in KERNELS}
        with torch.inference_mode(), ExitStack() as replaced:
            for module, name in KERNELS:
                replaced.enter_context(mock.patch.object(module, name, stand_ins[name]))
            for model in models():
                for rows in (1, 40, 256):
                    assert step(model.to(torch.bfloat16).eval(), rows).shape == (rows + 20, 64)
        for name, stand_in in stand_ins.items():
            assert stand_in.bytes_on_stack, f"{name} was never launched"
            most = max(stand_in.bytes_on_stack.values())
            print(f"sm_{architecture} {name}: {len(stand_in.bytes_on_stack)} kinds, at most {most} bytes on the stack")
            assert most <= MOST_ON_STACK, "registers do not hold what each thread works on"
    print("all compiled")


if __name__ == "__main__":
    sys.exit(main())
