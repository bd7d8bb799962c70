"""Checks of the Hub's token: is there one, may others read it, does the Hub take it. Above: `report`; below: the Hub.

The token goes to the Hub and nowhere else, and is never shown.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import httpx

from cli.doctor.finding import Finding, bad, note, ok

_HUB = "https://huggingface.co"
_TIMEOUT_S = 3.0
_NEW_TOKEN = "Make a new one at https://huggingface.co/settings/tokens and run `hf auth login`."


def token_file(environ: Mapping[str, str]) -> Path:
    """Return where the Hub's own tools keep the token."""
    if path := environ.get("HF_TOKEN_PATH"):
        return Path(path)
    home = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(home) / "token"


def check(environ: Mapping[str, str] | None = None) -> list[Finding]:
    """Is the Hub's token private and valid? One request, at most three seconds; none without a token."""
    values = os.environ if environ is None else environ
    path, found = token_file(values), []
    source, token = "HF_TOKEN", values.get("HF_TOKEN", "").strip()
    if path.is_file():
        if path.stat().st_mode & 0o077:
            found.append(bad("Hub token", f"others may read {path}", f"chmod 600 {path}"))
        if not token:
            try:
                source, token = str(path), path.read_text(encoding="ascii").strip()
            except (OSError, UnicodeError):
                return [*found, bad("Hub token", f"{path} cannot be read", _NEW_TOKEN)]
    if not token:
        return [*found, note("Hub token", "none; gated models cannot be pulled")]
    if values.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return [*found, note("Hub token", f"from {source}; not tried, HF_HUB_OFFLINE is set")]
    return [*found, _ask(values.get("HF_ENDPOINT", _HUB).rstrip("/"), source, token)]


def _ask(endpoint: str, source: str, token: str) -> Finding:
    try:
        with httpx.Client(timeout=_TIMEOUT_S, follow_redirects=False) as http:
            status = http.get(f"{endpoint}/api/whoami-v2", headers={"authorization": f"Bearer {token}"}).status_code
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError, ValueError) as error:
        return note("Hub token", f"from {source}; not tried ({type(error).__name__})")
    if status in (401, 403):
        return bad("Hub token", f"from {source}; {endpoint} refuses it", _NEW_TOKEN)
    if status == 200:
        return ok("Hub token", f"from {source}; {endpoint} takes it")
    return note("Hub token", f"from {source}; {endpoint} answers {status} and does not say")
