"""Literals in Python's notation, and JSON's `true`, `false`, `null` among them, to JSON text. Nothing is evaluated."""

from __future__ import annotations

import ast
import json

_NAMES: dict[str, object] = {"true": True, "false": False, "null": None}
_MAX_CHARS = 256 * 1024


def python_to_json(text: str) -> str | None:
    """Return the JSON of one literal; None when the text is none."""
    if len(text) > _MAX_CHARS:
        return None
    try:
        return json.dumps(json.loads(text, parse_constant=_refuse), ensure_ascii=False)
    except (ValueError, RecursionError):
        pass
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None


def _value(node: ast.expr) -> object:
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | bool | None):
        return node.value
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.expr) for key in node.keys):
        pairs = [(_value(key), _value(value)) for key, value in zip(node.keys, node.values, strict=True) if key]
        if all(isinstance(key, str) for key, _ in pairs):
            return {str(key): value for key, value in pairs}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        number = node.operand.value
        if isinstance(number, int | float) and not isinstance(number, bool):
            return -number
    raise ValueError("no literal")


def _refuse(name: str) -> object:
    raise ValueError(name)
