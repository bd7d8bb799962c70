"""`hostler doctor` on the Hub's token and the GPU's driver: what is wrong comes with advice, and no token is shown."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cli.doctor import hub_token, machine, servers_here

GOOD, WRONG = "hf_good0123456789good0123456789good", "hf_wrong0123456789wrong0123456789"


@pytest.fixture
def hub() -> Iterator[str]:
    """A Hub that knows one token."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_known = self.path == "/api/whoami-v2" and self.headers["authorization"] == f"Bearer {GOOD}"
            self.send_response(200 if is_known else 401)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def environment(hub: str, home: Path, **more: str) -> dict[str, str]:
    return {"HF_ENDPOINT": hub, "HF_HOME": str(home), **more}


@pytest.mark.parametrize(("token", "state"), [(GOOD, "ok"), (WRONG, "bad")])
def test_a_token_that_the_hub_refuses_is_bad_and_neither_is_shown(
    hub: str, tmp_path: Path, token: str, state: str
) -> None:
    (found,) = hub_token.check(environment(hub, tmp_path, HF_TOKEN=token))
    assert found.state == state
    assert bool(found.advice) is (state == "bad")
    assert token not in f"{found.detail}{found.advice}"


def test_a_token_file_that_others_may_read_is_found_and_its_token_tried(hub: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{GOOD}\n")
    file.chmod(0o644)
    found = hub_token.check(environment(hub, tmp_path))
    assert [(each.state, each.advice) for each in found] == [("bad", f"chmod 600 {file}"), ("ok", "")]
    file.chmod(0o600)
    assert [each.state for each in hub_token.check(environment(hub, tmp_path))] == ["ok"]
    file.write_bytes(b"\xff\xfe")
    assert [each.state for each in hub_token.check(environment(hub, tmp_path))] == ["bad"]


def test_without_a_token_or_a_hub_nothing_is_wrong(hub: str, tmp_path: Path) -> None:
    told = [
        hub_token.check(environment(hub, tmp_path)),
        hub_token.check(environment("http://127.0.0.1:1", tmp_path, HF_TOKEN=GOOD)),
        hub_token.check(environment(hub, tmp_path, HF_TOKEN=WRONG, HF_HUB_OFFLINE="1")),
    ]
    assert [[each.state for each in found] for found in told] == [["note"]] * 3


TOLD = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Release Build\nGCC version: 12.3\n"
TOLD_OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder@U22)\n"


@pytest.mark.parametrize(
    ("driver", "cuda", "state"),
    [
        ("570.133.20", "12.8", "ok"),
        ("470.82.01", "12.8", "bad"),
        ("570.1.2", "13.0", "bad"),
        ("580.95.05", "13.0", "ok"),
    ],
)
@pytest.mark.parametrize("told", [TOLD, TOLD_OPEN])
def test_a_driver_that_is_too_old_for_torchs_cuda_is_bad(told: str, driver: str, cuda: str, state: str) -> None:
    found = machine.driver(1, cuda, told.format(driver))
    assert found is not None
    assert (found.state, bool(found.advice)) == (state, state == "bad")


def test_a_driver_is_not_compared_without_gpus_or_where_it_tells_nothing() -> None:
    assert machine.driver(0, "12.8") is None
    assert machine.driver(2, "") is None
    for told, cuda in (("nonsense", "12.8"), (TOLD.format("570.1.2"), "99.0"), (TOLD.format("570.1.2"), "?")):
        found = machine.driver(1, cuda, told)
        assert found is not None
        assert found.state == "note"


def test_rays_token_is_among_the_files_that_must_be_private() -> None:
    assert {"ray.json", "token", "config.json"} <= set(servers_here._PRIVATE_FILES)
