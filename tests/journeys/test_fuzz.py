"""The short form of `make fuzz`: a few seconds of schemathesis, the same ones each time."""

from __future__ import annotations

import re

import pytest

from tests.fuzz.run import fuzz
from tests.journeys.server import Server

pytestmark = [pytest.mark.journey, pytest.mark.timeout(200)]

SEED = 20261129


def test_no_request_that_the_document_allows_ends_in_what_it_does_not_tell(scripted_server: Server) -> None:
    status, output = fuzz(scripted_server.url, model="scripted", seconds=8, seed=SEED, phases=("fuzzing",))
    assert status == 0, output[-6000:]
    tested = re.search(r"Tested: (\d+)", output)
    assert tested is not None, output
    assert int(tested[1]) > 20
