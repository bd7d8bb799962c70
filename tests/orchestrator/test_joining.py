"""Joining a cluster: its token, the run's own, and how long the cluster is there. Real files, sockets and processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hostler.channel import worker_key
from hostler.config import build, write_resolved
from hostler.rundir import RunDir

from orchestrator import ray_session


def test_every_process_of_a_run_gets_the_same_token_and_nobody_else_may_read_it(tmp_path: Path) -> None:
    token = RunDir(tmp_path).token()
    assert RunDir(tmp_path).token() == token
    assert len(bytes.fromhex(token)) == 32
    assert RunDir(tmp_path).token_file.stat().st_mode & 0o077 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["token"]


def test_a_worker_key_opens_one_worker_of_one_run() -> None:
    keys = {worker_key(token, worker) for token in ("t1", "t2") for worker in ("w1", "w2")}
    assert len(keys) == 4


def test_a_clusters_token_is_found_where_ray_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ray_session.cluster_token({}) == ""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("home\n")
    (tmp_path / "other").write_text("file\n")
    assert ray_session.cluster_token({}) == "home"
    assert ray_session.cluster_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}) == "file"
    assert ray_session.cluster_token({"RAY_AUTH_TOKEN": "variable"}) == "variable"


def test_a_cluster_is_published_once_it_answers_and_its_end_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    write_resolved(build({"ray_address": address}), tmp_path / "config.json")
    command = [sys.executable, "-m", "orchestrator.ray_head", "--run-dir", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "RAY_AUTH_TOKEN": "secret"}) as process:
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(2)
            assert ray_session.read(tmp_path) is None
            with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))) as listener:
                listener.settimeout(20)
                listener.accept()[0].close()
                listener.accept()[0].close()  # Asked again: it has been published.
                assert ray_session.read(tmp_path) == ray_session.RaySession(address, "secret", 0)
            assert process.wait(20) == 3
            assert ray_session.read(tmp_path) is None
            assert process.stderr is not None
            assert b"secret" not in process.stderr.read()
        finally:
            process.kill()
