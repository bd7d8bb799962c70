"""Which packages a run needs, by module, and which of them this interpreter lacks.

Above: the entry, before anything heavy is imported, and each step. Below: importlib alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

ENGINE: Mapping[str, str] = {
    "torch": "torch",
    "numpy": "numpy",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "jinja2": "jinja2",
    "llguidance": "llguidance",
    "grpc": "grpcio",
    "grpc_status": "grpcio-status",
    "google.protobuf": "protobuf",
    "google.rpc": "googleapis-common-protos",
    "psutil": "psutil",
    "rich": "rich",
}
"""Without these there is no engine, and nothing to measure: module and the package that has it."""

TESTS: Mapping[str, str] = {
    "pytest": "pytest",
    "pytest_asyncio": "pytest-asyncio",
    "pytest_timeout": "pytest-timeout",
    "hypothesis": "hypothesis",
    "httpx": "httpx",
}
INVENTORY: Mapping[str, str] = {"pydantic": "pydantic", "yaml": "pyyaml", "pynvml": "nvidia-ml-py"}


def missing(needed: Mapping[str, str]) -> list[str]:
    """Return the packages, in order, whose modules cannot be found."""
    return [package for module, package in needed.items() if not _is_there(module)]


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package that should hold it
        return False
