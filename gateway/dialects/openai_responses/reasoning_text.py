"""Reasoning as text that items carry, in the clear and sealed. Above: `messages`, `output_items`.

`encrypted_content` exists so that clients which keep nothing on a server can hand a model's reasoning back. Here the
reasoning is the caller's own and stands beside it in the clear, so sealing hides nothing: it is the text, encoded.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

_SEAL = "hostler-reasoning-1."


def sealed(text: str) -> str:
    """Return reasoning as the opaque text that `unsealed` reads."""
    return _SEAL + base64.urlsafe_b64encode(text.encode()).decode("ascii")


def unsealed(value: str) -> str:
    """Return the reasoning; empty for what another server made."""
    if not value.startswith(_SEAL):
        return ""
    try:
        return base64.b64decode(value[len(_SEAL) :], altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        return ""


def reasoning_of(item: dict[str, Any]) -> str:
    """Return the text of a reasoning item: its content, else what was sealed, else its summary; perhaps empty."""
    return _joined(item.get("content")) or unsealed(item.get("encrypted_content") or "") or _joined(item.get("summary"))


def _joined(parts: object) -> str:
    texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return "".join(text for text in texts if isinstance(text, str))
