"""The one door to everything under /admin. Above: `routes.admin`, whose router depends on it; below: `services`.

Whoever comes here has passed `doors.Gate`, so holds the key if there is one; this is the place for a check that the
key may administer. What is left to keep out are other sites' pages in a browser of this machine.
"""

from __future__ import annotations

from fastapi import Request
from hostler.errors import PermissionDenied, UnsupportedMedia

from gateway.services import services_of

_JSON = "application/json"


async def admin_door(request: Request) -> None:
    """Let a caller through who may see and change what is loaded.

    Raises:
        PermissionDenied: no key is demanded here, and a web page asks.
        UnsupportedMedia: a POST that does not say it is JSON; a page may send those to a local port unasked.
    """
    headers = request.headers
    from_page = "origin" in headers or headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
    if from_page and services_of(request).config.api_key is None:
        raise PermissionDenied("Web pages may not administer a server that demands no API key. Set one with api_key.")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.method == "POST" and kind != _JSON:
        raise UnsupportedMedia(f"Send 'Content-Type: {_JSON}' and a JSON object as the body.")
