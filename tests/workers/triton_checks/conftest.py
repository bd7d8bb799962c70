"""Decides where the kernels run before any of these checks imports them; without Triton there are none."""

from __future__ import annotations

import importlib.util

from tests.workers.triton_checks.place import choose_place

choose_place()
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]  # `test_triton.py` brings it
