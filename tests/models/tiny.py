"""Tiny causal models with random weights: real architectures, a real tokenizer, a few hundred kilobytes each.

Above it: the fixtures and tests of every room. Below it: torch, transformers, tokenizers. Each is built once into
~/.cache/hostler/test-models/<version>/ (or $HOSTLER_TEST_MODELS_DIR) and is the same on every machine with the same
torch. `python -m tests.models.tiny` builds them all.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.kept import kept

VERSION = "2"
"""Raise it when anything below changes what is built."""

VOCABULARY = 1024
CONTEXT_TOKENS = 4096
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SHOWN_TOKENS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
DEFAULT_SYSTEM_PROMPT = "You are a tiny model."

CHAT_TEMPLATE = """\
{%- set given = messages[0]['content'] if messages and messages[0]['role'] == 'system' else default_system %}
{{- '<|im_start|>system\\n' + given }}
{%- if tools %}
    {{- '\\n\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools>\\nTo call a function, write <tool_call>{"name": ..., "arguments": ...}</tool_call>.' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {{- '\\n<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
            {{- function.arguments if function.arguments is string else function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""".replace("default_system", repr(DEFAULT_SYSTEM_PROMPT))

_TRAINING_MODULES = (
    "argparse.py",
    "ast.py",
    "asyncio/base_events.py",
    "datetime.py",
    "email/message.py",
    "json/decoder.py",
)
_TRAINING_TEXT = "Thé quick brown fox jumps over the lazy dog. 你好，世界 🙂 Привет, мир! " * 4

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT_TOKENS,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# With random weights, a tied projection lets some architectures only repeat the last token.
_UNTIED = {**SIZES, "tie_word_embeddings": False}


def _qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SIZES))


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_UNTIED))


def _qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {key: value for key, value in _UNTIED.items() if key != "head_dim"}
    return Qwen2ForCausalLM(Qwen2Config(**sizes))


def _mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=32))


def _gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**_UNTIED, sliding_window=32, layer_types=layers, query_pre_attn_scalar=16)
    return Gemma3ForCausalLM(config)


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 36, "norm_topk_prob": False}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SIZES, "num_hidden_layers": 3}, **experts, mlp_only_layers=[1]))


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**_UNTIED, **experts, sliding_window=32))


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "qwen3": _qwen3,
    "llama": _llama,
    "qwen2": _qwen2,
    "mistral": _mistral,
    "gemma3": _gemma3,
}
"""qwen3: query and key norms; qwen2: biases; mistral: a sliding window of 32 tokens in every layer;
gemma3: one sliding and one full layer. All have 4 heads and 2 key-value heads; qwen3 and mistral tie their output
projection to the embedding."""

WITH_EXPERTS: dict[str, Callable[[], Any]] = {"qwen3_moe": _qwen3_moe, "mixtral": _mixtral}
"""qwen3_moe: two of six experts for a token, shares as they are, one layer without; mixtral: two of four, shares that
add up to one, a sliding window of 32 tokens."""


def cache_dir() -> Path:
    """Return where built models of this version are kept."""
    base = os.environ.get("HOSTLER_TEST_MODELS_DIR")
    return (Path(base) if base else Path.home() / ".cache" / "hostler" / "test-models") / VERSION


def tiny_model(architecture: str = "qwen3") -> Path:
    """Return the directory of a tiny fp32 model, building it if it is not there yet.

    Raises:
        KeyError: no such architecture; `ARCHITECTURES` and `WITH_EXPERTS` have them all.
    """
    build = (ARCHITECTURES | WITH_EXPERTS)[architecture]
    return kept(cache_dir() / f"tiny-{architecture}", partial(_save, build))


def _save(build: Callable[[], Any], directory: Path) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build().to(torch.float32).eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    # transformers' 0.02 makes every reply one token repeated; biases and norms start without effect.
                    if name.endswith("norm.weight"):
                        parameter.add_(torch.randn_like(parameter) * 0.1)
                    else:
                        parameter.normal_(0.0, 0.35 if "embed" in name or "lm_head" in name else 0.15)
    finally:
        torch.set_num_threads(threads)
    model.generation_config.eos_token_id = [2, 0]
    model.generation_config.pad_token_id = 0
    model.save_pretrained(directory)
    _write_tokenizer(directory)


def train_tokenizer() -> Any:
    """Return a byte-level BPE `tokenizers.Tokenizer` of exactly `VOCABULARY` tokens, the special ones first.

    Trained on modules of this Python's standard library; every byte string can be encoded.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    room = VOCABULARY - len(SHOWN_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=room,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [(library / module).read_text(encoding="utf-8") for module in _TRAINING_MODULES]
    tokenizer.train_from_iterator([*texts, _TRAINING_TEXT], trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in SHOWN_TOKENS])
    return tokenizer


def _write_tokenizer(directory: Path) -> None:
    train_tokenizer().save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_TOKENS,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for each in ARCHITECTURES | WITH_EXPERTS:
        sys.stdout.write(f"{tiny_model(each)}\n")
