"""What fuzzing found once: each stays mended. New ones come from `make fuzz`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway.fakes import MODEL, World

_NOT_TYPES: list[Any] = [{}, [], {"a": 1}, ["text"], 3, True]


@pytest.mark.parametrize("kind", _NOT_TYPES, ids=repr)
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/responses/input_tokens", "/v1/chat/completions"])
async def test_a_part_whose_type_is_no_string_is_refused(called: World, path: str, kind: Any) -> None:
    turn = {"role": "system", "content": [{"type": kind, "text": "x"}]}
    for name in ("input", "messages"):
        reply = await called.client.post(path, json={"model": MODEL, name: [turn]})
        assert (reply.status_code, set(reply.json()["error"])) == (400, {"message", "type", "param", "code"})
