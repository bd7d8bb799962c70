"""The short form of `make fuzz`: a few requests to each operation, the same ones each time."""

from __future__ import annotations

import re

import pytest

from gateway.openapi.operations import OPERATIONS
from tests.fuzz.run import Bound, fuzz
from tests.journeys.server import Server

pytestmark = [pytest.mark.journey, pytest.mark.timeout(200)]

SEED = 20261129
# Others use the same server: nothing may be unloaded under them.
LEFT_OUT = ("/admin",)


def test_no_request_that_the_document_allows_ends_in_what_it_does_not_tell(scripted_server: Server) -> None:
    status, output = fuzz(
        scripted_server.url,
        model="scripted",
        bound=Bound(num_examples=3),
        seed=SEED,
        phases=("fuzzing",),
        left_out=LEFT_OUT,
    )
    assert status == 0, output[-6000:]
    tested = re.search(r"Tested: +(\d+)", output)
    assert tested is not None, output
    assert int(tested[1]) == sum(not operation.path.startswith(LEFT_OUT) for operation in OPERATIONS)
