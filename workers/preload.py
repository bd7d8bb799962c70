"""Imported by fresh Ray worker processes before they get a model, so that a load does not wait for imports."""

from __future__ import annotations

import workers.server
import workers.text.opening  # noqa: F401
