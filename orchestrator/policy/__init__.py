"""Where a model goes and who gives way: `plan`, a pure function over frozen views.

Above it: `placing.py` and the simulator. Below it: `views.py`; no clock, no input or output.
"""

from orchestrator.policy.plan import plan

__all__ = ["plan"]
