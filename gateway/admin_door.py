"""The one door to everything under /admin. Above: `routes.admin`, whose router depends on it; below: `services`.

Whoever comes here has passed `doors.Gate`, so holds a key if one is demanded. Not every key may administer; where none
is demanded, other sites' pages in a browser of this machine are to be kept out.
"""

from __future__ import annotations

from fastapi import Request
from hostler.errors import PermissionDenied, UnsupportedMedia

from gateway.doors import caller_of
from gateway.services import services_of

_JSON = "application/json"


async def admin_door(request: Request) -> None:
    """Let a caller through who may see and change what is loaded.

    Raises:
        PermissionDenied: the key lacks the scope `admin`, or no key is demanded here, and a web page asks.
        UnsupportedMedia: a POST that does not say it is JSON; a page may send those to a local port unasked.
    """
    if "admin" not in caller_of(request.scope).scopes:
        raise PermissionDenied("This API key may not administer: it lacks the scope 'admin'.")
    headers = request.headers
    from_page = "origin" in headers or headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
    if from_page and not services_of(request).ring.demands:
        raise PermissionDenied("Web pages may not administer a server that demands no API key. Set one with api_key.")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.method == "POST" and kind != _JSON:
        raise UnsupportedMedia(f"Send 'Content-Type: {_JSON}' and a JSON object as the body.")
