"""What the store says that hearing will take, beside what a process that hears was seen to hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from orchestrator.store import footprint
from tests.journeys.server import ROOT
from tests.models.tiny_whisper import tiny_whisper

WIDTH = {"d_model": 384, "encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536}
HEADS = {"encoder_attention_heads": 6, "decoder_attention_heads": 6}
LAYERS = {"encoder_layers": 4, "decoder_layers": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the shape of whisper-tiny, but for the vocabulary."""
    path = tiny_whisper(tmp_path_factory.mktemp("hears"), **WIDTH, **HEADS, **LAYERS, max_target_positions=448)
    file = path / "model.safetensors"
    halves = {name: tensor.astype(np.float16) for name, tensor in load_file(file).items()}
    save_file(halves, file, {"format": "pt"})  # So that weights are copied, not mapped: mapped ones are not counted.
    return path


def held(path: Path, dtype: str, beams: int) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.workers.heard_memory", str(path), dtype, str(beams)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(500)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_hearing_holds_is_reserved_before_and_not_much_more(model: Path, dtype: str) -> None:
    needs = [footprint(model, dtype, generates=False, beams=beams) for beams in (1, 5)]
    one, five = (need.weight_bytes + need.workspace_bytes for need in needs)
    with_one, with_five = held(model, dtype, 1), held(model, dtype, 5)
    assert 0.6 * one < with_one["peak"] < one
    assert 0.6 * five < with_five["peak"] < five
    assert with_five["loaded"] - with_one["loaded"] == pytest.approx(five - one, rel=0.2)
