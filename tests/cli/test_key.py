"""`hostler key`: keys are shown once, stored hashed, found by `hostler serve`, and gone when revoked."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hostler.keys import KeyFile, KeysError
from typer.testing import Result

from cli import settings
from cli.exits import UsageError

Hostler = Callable[..., Result]


@pytest.fixture
def path(place: Path) -> Path:
    return place / "home" / ".config" / "hostler" / "keys.json"


def test_a_key_is_shown_once_and_only_its_hash_is_stored(hostler: Hostler, path: Path) -> None:
    made = hostler("key", "create", "laptop")
    assert made.exit_code == 0, made.output
    key = made.stdout.strip()
    assert key.startswith("hk_")
    assert len(key) == 46
    text = path.read_text()
    assert key not in text
    assert hashlib.sha256(key.encode()).hexdigest() in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key not in hostler("key", "list").output


def test_everything_that_a_key_may_be_told_is_kept(hostler: Hostler) -> None:
    flags = "--scope infer --scope admin --model a --model b* --requests-per-minute 5 --tokens-per-minute 100"
    made = hostler("key", "create", "ci", *flags.split(), "--max-streams", "2", "--expires", "30d", "--json")
    shown = json.loads(made.stdout)
    (listed,) = json.loads(hostler("key", "list", "--json").stdout)
    assert shown.pop("key").startswith("hk_")
    assert shown == listed
    assert sorted(listed["scopes"]) == ["admin", "infer"]
    assert listed["models"] == ["a", "b*"]
    assert [listed[name] for name in ("requests_per_minute", "tokens_per_minute", "max_streams")] == [5, 100, 2]
    assert listed["expires_at"] - listed["created_at"] == pytest.approx(30 * 86400)
    assert "digest" not in listed


def test_a_key_is_revoked_by_name_or_id(hostler: Hostler) -> None:
    for name in ("one", "two"):
        identity = json.loads(hostler("key", "create", name, "--json").stdout)["id"]
    assert hostler("key", "revoke", "one").exit_code == 0
    assert hostler("key", "revoke", identity).exit_code == 0
    assert json.loads(hostler("key", "list", "--json").stdout) == []
    gone = hostler("key", "revoke", "one")
    assert gone.exit_code == 1
    assert "hostler key list" in gone.stderr


@pytest.mark.parametrize(
    "flags", [("a b",), ("x", "--scope", "root"), ("x", "--expires", "soon"), ("x", "--expires", "0"), ("x" * 65,)]
)
def test_what_cannot_be_is_one_line(hostler: Hostler, flags: tuple[str, ...], path: Path) -> None:
    refused = hostler("key", "create", *flags)
    assert refused.exit_code in (1, 2)
    assert refused.stderr.count("\n") == 1
    assert not path.exists()


def test_a_name_is_given_once(hostler: Hostler) -> None:
    assert hostler("key", "create", "laptop").exit_code == 0
    assert "hostler key revoke laptop" in hostler("key", "create", "laptop").stderr


def test_a_file_that_others_can_read_is_refused(hostler: Hostler, path: Path) -> None:
    hostler("key", "create", "laptop")
    path.chmod(0o644)
    assert "chmod 600" in hostler("key", "list").stderr
    with pytest.raises(KeysError, match="chmod 600"):
        KeyFile(path).read()


@pytest.mark.parametrize(
    "text", ["", "{", '{"version": 2, "keys": []}', '{"version": 1, "keys": [{}]}', "x" * 1_000_001]
)
def test_what_is_no_key_file_is_refused(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.touch(0o600)
    path.write_text(text)
    with pytest.raises(KeysError):
        KeyFile(path).read()


def test_serve_lets_others_in_once_there_is_a_key(hostler: Hostler, path: Path) -> None:
    flags = settings.Flags(host="0.0.0.0")
    with pytest.raises(UsageError, match="hostler key create laptop"):
        settings.resolve(flags, {})
    assert hostler("key", "create", "laptop").exit_code == 0
    config, _ = settings.resolve(flags, {})
    assert config.keys_file == path
    assert hostler("key", "revoke", "laptop").exit_code == 0
    with pytest.raises(UsageError, match="hostler key create laptop"):
        settings.resolve(flags, {})


def test_loopback_needs_none_unless_the_configuration_says_so(hostler: Hostler, place: Path) -> None:
    settings.resolve(settings.Flags(), {})
    (place / "hostler.yaml").write_text("require_key: true\nkeys_file: mine.json\n")
    with pytest.raises(UsageError, match="require_key is set"):
        settings.resolve(settings.Flags(), {})
    assert hostler("key", "create", "laptop").exit_code == 0
    config, _ = settings.resolve(settings.Flags(cors=("https://x.org",)), {})
    assert config.keys_file == place / "mine.json"
