"""Which certificates the commands trust when a server is reached by https. Above: `chat_http`, `doctor`, `outside`."""

from __future__ import annotations

import os
import ssl


def trusted() -> ssl.SSLContext:
    """Return the usual authorities, or those of $SSL_CERT_FILE."""
    import certifi

    return ssl.create_default_context(cafile=os.environ.get("SSL_CERT_FILE") or certifi.where())
