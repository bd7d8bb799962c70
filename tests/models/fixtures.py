"""Pytest fixtures for models; `tests/conftest.py` loads it: `pytest_plugins = ["tests.models.fixtures"]`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import real, tiny, tiny_vision, wheels


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A 2-layer Qwen3 with a 1024-token tokenizer and a ChatML template with tools, fp32."""
    return tiny.tiny_model("qwen3")


@pytest.fixture(scope="session")
def tiny_model_of() -> Callable[[str], Path]:
    """The tiny model of a named architecture; `tests.models.tiny.ARCHITECTURES` lists them."""
    return tiny.tiny_model


@pytest.fixture(params=sorted(tiny.ARCHITECTURES), scope="session")
def tiny_model_of_each_architecture(request: pytest.FixtureRequest) -> Path:
    """Each tiny model in turn."""
    return tiny.tiny_model(request.param)


@pytest.fixture(scope="session")
def tiny_thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Qwen3 with a template that opens `<think>` in the prompt, as DeepSeek R1's does."""
    directory = tmp_path_factory.mktemp("tiny-thinker")
    for file in tiny.tiny_model("qwen3").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    opening = "'<|im_start|>assistant\\n'"
    assert opening in config["chat_template"]
    config["chat_template"] = "{# </think> #}" + config["chat_template"].replace(
        opening, "'<|im_start|>assistant\\n<think>\\n'"
    )
    path.write_text(json.dumps(config), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct; mark the test `real_model`."""
    return real.smollm2()


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, which makes embeddings; mark the test `real_model`."""
    return real.minilm()


@pytest.fixture(scope="session")
def piper_joe() -> Path:
    """The Piper voice "joe", which speaks American English; mark the test `real_model`."""
    return real.piper_joe()


@pytest.fixture(scope="session")
def tiny_llava() -> Path:
    """A tiny LLaVA that names the colour of a picture, fp32; trained for half a minute when it is first asked for."""
    return tiny_vision.tiny_vision_model("llava")


@pytest.fixture(scope="session")
def qwen_coder() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct, which calls tools; mark the test `real_model`."""
    return wheels.qwen_coder()
