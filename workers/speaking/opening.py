"""Opens a text-to-speech model: finds out of which family its files are, loads it, starts the engine.

Above: `host.py`. Below: one file for each family. `FAMILIES` is the place where another one is added.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

from hostler.errors import HostlerError, ModelLoadFailed

from workers.engine import LoadSpec, ModelFacts
from workers.refusals import refuse_beams, refuse_text_options
from workers.speaking.engine import SpeakingEngine
from workers.speaking.models import SpeechModel

Report = Callable[[str, int, int], None]


async def open_speaking_engine(spec: LoadSpec, report: Report) -> SpeakingEngine:
    """Load a text-to-speech model and return its engine.

    Raises:
        ModelLoadFailed: the directory cannot be served.
        UnsupportedParameter: an option that this engine does not have.
    """
    model, facts = await asyncio.to_thread(load, spec, report)
    return SpeakingEngine(model, facts, spec)


def load(spec: LoadSpec, report: Report) -> tuple[SpeechModel, ModelFacts]:
    """Load `spec.path`. Blocking: seconds.

    Raises:
        ModelLoadFailed, UnsupportedParameter: as above.
    """
    refuse_text_options(spec, "speaking models")
    refuse_beams(spec, "speaking models")
    path = Path(spec.path)
    weights = [*path.glob("*.safetensors"), *path.glob("*.onnx")]
    total = sum(file.stat().st_size for file in weights)
    report("read", 0, total)
    family = _family_of(spec, path)
    if family not in FAMILIES:
        served = ", ".join(sorted(FAMILIES))
        raise ModelLoadFailed(f"{spec.model} is of the family {family[:60]!r}, which does not speak here; {served} do.")
    model, facts = FAMILIES[family](spec, path)
    report("read", total, total)
    report("warm-up", 0, 0)
    try:
        for symbols in model.read("a")[:1]:
            model.speak(symbols, 0, 1.0)
    except HostlerError as error:
        model.close()
        raise ModelLoadFailed(f"{spec.model} is loaded but cannot speak: {error.message}") from error
    except BaseException:
        model.close()
        raise
    return model, facts


def _family_of(spec: LoadSpec, path: Path) -> str:
    """Return "piper", or the `model_type` of transformers."""
    if not (path / "config.json").is_file() and list(path.glob("*.onnx")):
        return "piper"
    try:
        return str(json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type"))
    except (OSError, ValueError, AttributeError) as error:
        raise ModelLoadFailed(f"The files of {spec.model} are no text-to-speech model.") from error


def _open_piper(spec: LoadSpec, path: Path) -> tuple[SpeechModel, ModelFacts]:
    from workers.speaking.piper import open_piper

    files = sorted(path.glob("*.onnx"))
    if len(files) != 1:
        raise ModelLoadFailed(f"The directory of {spec.model} holds {len(files)} voices; it must hold one.")
    voice, num_bytes = open_piper(spec, files[0])
    return voice, _facts(spec, voice, "PiperVoice", num_bytes // 4, num_bytes)


def _open_vits(spec: LoadSpec, path: Path) -> tuple[SpeechModel, ModelFacts]:
    from workers.speaking.vits import open_vits

    model, num_parameters, num_bytes = open_vits(spec, path)
    return model, _facts(spec, model, "VitsModel", num_parameters, num_bytes)


def _facts(spec: LoadSpec, model: SpeechModel, architecture: str, num_parameters: int, num_bytes: int) -> ModelFacts:
    return ModelFacts(
        model=spec.model,
        engine="speech",
        architecture=architecture,
        dtype="float32",
        max_context_tokens=0,
        num_parameters=num_parameters,
        weight_bytes=num_bytes,
        voices=tuple(model.voices),
    )


FAMILIES: dict[str, Callable[[LoadSpec, Path], tuple[SpeechModel, ModelFacts]]] = {
    "piper": _open_piper,
    "vits": _open_vits,
}
"""Each has been compared with the library that its models come from."""
