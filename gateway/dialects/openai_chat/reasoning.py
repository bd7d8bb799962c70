"""How much a reply may think: OpenAI's `reasoning_effort` and the names that other servers gave the same wish.

Above: `request`; below: `fields`.
"""

from __future__ import annotations

from hostler.errors import InvalidRequest
from hostler.inference.v1 import inference_pb2 as pb

from gateway.fields import Fields

_MAX_BUDGET = 2**31 - 1
_BUDGETS = ("thinking_token_budget", "thinking_budget")


def parse_reasoning(fields: Fields) -> pb.Reasoning | None:
    """Return the wish, or None when the request says nothing about it.

    `reasoning_effort`, or `reasoning: {"effort", "max_tokens", "enabled"}`; `enable_thinking` and a budget in tokens,
    as `thinking_budget` or `thinking_token_budget`.

    Raises:
        InvalidRequest: of the wrong type, or two different efforts.
    """
    nested = fields.child("reasoning") or Fields({}, "reasoning")
    effort, inner = fields.string("reasoning_effort", 32), nested.string("effort", 32)
    if effort is not None and inner is not None and effort != inner:
        raise InvalidRequest("'reasoning_effort' and 'reasoning.effort' differ.", param="reasoning_effort")
    effort = effort or inner
    enabled = fields.boolean("enable_thinking")
    if enabled is None:
        enabled = nested.boolean("enabled")
    budget = nested.integer("max_tokens", 0, _MAX_BUDGET)
    for name in _BUDGETS:
        if budget is None:
            budget = fields.integer(name, 0, _MAX_BUDGET)
    if effort == "none":
        effort, enabled = None, False
    if effort is None and enabled is None and budget is None:
        return None
    return pb.Reasoning(enabled=enabled, effort=effort or "", budget_tokens=budget)
