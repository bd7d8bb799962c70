"""A tiny Whisper with random weights: Whisper's own shapes and tokens, two layers, a few hundred kilobytes.

Above: tests of the hearing engine and of the store. Below: `tiny.py`, torch, transformers, tokenizers. Built into a
directory that the test gives. It hears nothing, but says the same as transformers' own decoding of it.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

LANGUAGES = ("en", "de", "ja")
NUM_WORDS = 512
SPECIAL = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    *(f"<|{code}|>" for code in LANGUAGES),
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
)
NUM_TIMES = 1501
SIZES: dict[str, Any] = {
    "vocab_size": NUM_WORDS + len(SPECIAL) + NUM_TIMES,
    "num_mel_bins": 80,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_source_positions": 1500,
    "max_target_positions": 64,
}


def ids() -> dict[str, int]:
    """Return the control tokens' ids."""
    return {token: NUM_WORDS + index for index, token in enumerate(SPECIAL)}


def tokenizer_json() -> dict[str, Any]:
    """Return tokenizer.json: byte-level BPE, the control tokens, and the times last."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_WORDS, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator([Path(json.__file__).read_text(encoding="utf-8")], trainer)
    assert tokenizer.get_vocab_size() == NUM_WORDS
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    times = [AddedToken(f"<|{step * 0.02:.2f}|>", special=False, normalized=False) for step in range(NUM_TIMES)]
    tokenizer.add_tokens(times)
    described: dict[str, Any] = json.loads(tokenizer.to_str())
    return described


def tiny_whisper(directory: Path, *, seed: int = 0, **sizes: int) -> Path:
    """Write the model and return its directory; `sizes` replace those of `SIZES`."""
    import torch
    from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    known = ids()
    end = known["<|endoftext|>"]
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    config = WhisperConfig(**SIZES | sizes, **special, decoder_start_token_id=known["<|startoftranscript|>"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WhisperForConditionalGeneration(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name and "encoder.embed_positions" not in name:
                    parameter.normal_(0.0, 0.5 if "embed_tokens" in name else 0.3)
    model.generation_config = GenerationConfig(
        **special,
        decoder_start_token_id=known["<|startoftranscript|>"],
        prev_sot_token_id=known["<|startofprev|>"],
        no_timestamps_token_id=known["<|notimestamps|>"],
        is_multilingual=True,
        lang_to_id={f"<|{code}|>": known[f"<|{code}|>"] for code in LANGUAGES},
        task_to_id={"transcribe": known["<|transcribe|>"], "translate": known["<|translate|>"]},
        max_initial_timestamp_index=50,
        suppress_tokens=[1, 2, 7],
        begin_suppress_tokens=[3, end],
        alignment_heads=[[1, 0], [1, 1]],
        max_length=config.max_target_positions,
        return_timestamps=False,
    )
    model.save_pretrained(directory)
    WhisperFeatureExtractor().save_pretrained(directory)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_json()), encoding="utf-8")
    settings = {"tokenizer_class": "WhisperTokenizer", "model_max_length": 1024}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        settings[name] = "<|endoftext|>"
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def as_ctranslate2(model: Path, directory: Path, *, int8: bool = False) -> Path:
    """Write the model in CTranslate2's form, its float32 weights as they are or in int8; return the directory."""
    from safetensors.numpy import load_file

    weights = load_file(model / "model.safetensors")
    tensors: dict[str, Any] = {}

    def put(name: str, value: Any) -> None:
        value = np.asarray(value)
        if int8 and name.endswith("/weight") and value.ndim == 2 and "embeddings" not in name:
            scale = 127.0 / np.maximum(np.abs(value).max(axis=1), 1e-9)
            tensors[f"{name}_scale"] = scale.astype(np.float32)
            value = np.rint(value * scale[:, None]).astype(np.int8)
        tensors[name] = value

    def layer(side: str, number: int) -> None:
        start, to = f"model.{side}.layers.{number}.", f"{side}/layer_{number}/"

        def pair(name: str, target: str, kinds: tuple[str, str]) -> None:
            for kind, word in zip(("weight", "bias"), kinds, strict=True):
                put(f"{to}{target}/{word}", weights[f"{start}{name}.{kind}"])

        def fused(names: tuple[str, ...], target: str) -> None:
            biases = [weights.get(f"{start}{n}.bias", np.zeros(SIZES["d_model"], np.float32)) for n in names]
            put(f"{to}{target}/weight", np.concatenate([weights[f"{start}{n}.weight"] for n in names]))
            put(f"{to}{target}/bias", np.concatenate(biases))

        norm, linear = ("gamma", "beta"), ("weight", "bias")
        pair("self_attn_layer_norm", "self_attention/layer_norm", norm)
        fused(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attention/linear_0")
        pair("self_attn.out_proj", "self_attention/linear_1", linear)
        if side == "decoder":
            pair("encoder_attn_layer_norm", "attention/layer_norm", norm)
            pair("encoder_attn.q_proj", "attention/linear_0", linear)
            fused(("encoder_attn.k_proj", "encoder_attn.v_proj"), "attention/linear_1")
            pair("encoder_attn.out_proj", "attention/linear_2", linear)
        pair("final_layer_norm", "ffn/layer_norm", norm)
        pair("fc1", "ffn/linear_0", linear)
        pair("fc2", "ffn/linear_1", linear)

    for side in ("encoder", "decoder"):
        put(f"{side}/num_heads", np.int16(2))
        put(f"{side}/position_encodings/encodings", weights[f"model.{side}.embed_positions.weight"])
        for kind, word in (("weight", "gamma"), ("bias", "beta")):
            put(f"{side}/layer_norm/{word}", weights[f"model.{side}.layer_norm.{kind}"])
        layer(side, 0)
        layer(side, 1)
    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            put(f"encoder/{conv}/{kind}", weights[f"model.encoder.{conv}.{kind}"])
    put("decoder/embeddings/weight", weights["model.decoder.embed_tokens.weight"])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.bin").write_bytes(_model_bin(tensors))
    described = {"alignment_heads": [[1, 0], [1, 1]], "lang_ids": [], "suppress_ids": [1, 2, 7]}
    described["suppress_ids_begin"] = [3, NUM_WORDS]
    (directory / "config.json").write_text(json.dumps(described), encoding="utf-8")
    (directory / "vocabulary.txt").write_text("", encoding="utf-8")
    tokenizer = tokenizer_json()
    first_time = ids()["<|notimestamps|>"] + 1
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < first_time]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return directory


def _model_bin(tensors: dict[str, Any]) -> bytes:
    kinds = {np.dtype(np.float32): 0, np.dtype(np.int8): 1, np.dtype(np.int16): 2}

    def name(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    parts = [struct.pack("<I", 6), name("WhisperSpec"), struct.pack("<II", 3, len(tensors))]
    for key, value in tensors.items():
        data = np.ascontiguousarray(value).tobytes()
        parts += [name(key), struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)]
        parts += [struct.pack("<BI", kinds[value.dtype], len(data)), data]
    aliases = [struct.pack("<I", 1), name("decoder/projection/weight"), name("decoder/embeddings/weight")]
    return b"".join(parts + aliases)
