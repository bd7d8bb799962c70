"""`hostler service`: the unit that it writes, what it refuses, and what it has systemd do (which a script plays)."""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from hostler import rundir
from typer.testing import Result

from cli import servers, settings
from cli.exits import UsageError
from cli.service import control, systemd
from cli.service import status as showing
from cli.service.unit import MARK, Scope, Unit, quoted, text

Hostler = Callable[..., Result]

SYSTEMCTL = """\
#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in
  --version) echo "systemd 254 (254.1)" ;;
  *"--property=Version"*) echo 254.1 ;;
  *show*) cat "$SHOWN" ;;
  *restart*) exit "${RESTART_EXIT:-0}" ;;
esac
"""


@pytest.fixture
def calls(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `systemctl` that writes down what it is told; SHOWN is what it knows of every unit."""
    tools = place / "tools"
    tools.mkdir()
    (tools / "systemctl").write_text(SYSTEMCTL)
    (tools / "systemctl").chmod(0o755)
    (place / "calls").touch()
    (place / "shown").write_text("LoadState=not-found\n")
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("CALLS", str(place / "calls"))
    monkeypatch.setenv("SHOWN", str(place / "shown"))
    # Directories of tests lie in /tmp, which a system service does not see.
    monkeypatch.setattr(systemd, "_LINGERING", place / "linger")
    return place / "calls"


def unit_file(place: Path) -> Path:
    return place / "home" / ".config" / "systemd" / "user" / "hostler.service"


def environment_file(place: Path) -> Path:
    return place / "home" / ".config" / "hostler" / "env"


def test_install_writes_a_unit_enables_and_starts_it(hostler: Hostler, calls: Path, place: Path) -> None:
    result = hostler("service", "install", "--memory-max", "24G", "--", "Qwen/Qwen3-0.6B", "--port", "9000")
    assert result.exit_code == 0, result.output
    written = unit_file(place).read_text()
    program = Path(sys.executable).with_name("hostler")
    assert f"ExecStart={program} serve Qwen/Qwen3-0.6B --port 9000\n" in written
    assert f"ExecReload={program} reload --port 9000\n" in written
    assert f"WorkingDirectory={place}\n" in written
    assert "MemoryMax=24G\n" in written
    assert "MemoryHigh" not in written
    assert "RestartSteps=6\nRestartMaxDelaySec=60\n" in written  # this systemd is new enough
    assert "WantedBy=default.target" in written
    assert "--linger" in result.output
    told = [line for line in calls.read_text().splitlines() if "show" not in line and line != "--version"]
    assert told == ["--user daemon-reload", "--user enable hostler.service", "--user restart hostler.service"]
    assert stat.S_IMODE(environment_file(place).stat().st_mode) == 0o600


def test_printing_needs_no_systemd_and_writes_nothing(
    hostler: Hostler, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(place))
    result = hostler("service", "install", "--print")
    assert result.exit_code == 0, result.output
    assert result.output.startswith(MARK)
    assert "RestartSteps" not in result.output
    assert not unit_file(place).exists()


def test_where_there_is_no_systemd_it_says_what_to_do_instead(
    hostler: Hostler, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(place))
    for words in (["install"], ["status"], ["uninstall"], ["start"]):
        result = hostler("service", *words)
        assert result.exit_code == 1
        assert "there is no systemd here. In a container" in result.output
    assert not unit_file(place).exists()
    assert not environment_file(place).exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prt", "1"], "No such option"),
        (["./missing"], "no such file"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--api-key", "k" * 40], "for all to read"),
        (["--host", "0.0.0.0"], "hostler/env"),
    ],
)
def test_what_serve_would_refuse_is_refused_before_anything_is_written(
    hostler: Hostler, calls: Path, place: Path, arguments: list[str], said: str
) -> None:
    result = hostler("service", "install", "--", *arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert not unit_file(place).exists()
    assert calls.read_text() in ("", "--version\n")


def test_the_key_goes_into_a_file_that_only_its_owner_reads(
    hostler: Hostler, calls: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSTLER_API_KEY", "first-" + "k" * 32)
    forgotten = hostler("service", "install")
    assert "--with-key" in forgotten.output
    assert "first-" not in environment_file(place).read_text()
    environment_file(place).write_text("HF_TOKEN=kept\nHOSTLER_API_KEY=old\n")
    result = hostler("service", "install", "--with-key", "--", "--host", "0.0.0.0")
    assert result.exit_code == 0, result.output
    assert environment_file(place).read_text() == "HF_TOKEN=kept\nHOSTLER_API_KEY=first-" + "k" * 32 + "\n"
    assert stat.S_IMODE(environment_file(place).stat().st_mode) == 0o600
    assert "first-" not in unit_file(place).read_text() + result.output
    # From then on the door may be open without saying so again: the service has its key.
    monkeypatch.delenv("HOSTLER_API_KEY")
    assert hostler("service", "install", "--", "--host", "0.0.0.0").exit_code == 0


def test_a_unit_of_somebody_else_is_left_alone(hostler: Hostler, calls: Path, place: Path) -> None:
    unit_file(place).parent.mkdir(parents=True)
    unit_file(place).write_text("[Service]\nExecStart=/bin/true\n")
    for words in (["install"], ["uninstall"]):
        result = hostler("service", *words)
        assert result.exit_code == 1
        assert "not one that hostler wrote" in result.output
    assert unit_file(place).read_text() == "[Service]\nExecStart=/bin/true\n"


def test_uninstall_stops_and_removes_but_keeps_the_environment_file(hostler: Hostler, calls: Path, place: Path) -> None:
    hostler("service", "install")
    result = hostler("service", "uninstall")
    assert result.exit_code == 0, result.output
    assert not unit_file(place).exists()
    assert environment_file(place).exists()
    assert "--user disable --now hostler.service" in calls.read_text()
    assert hostler("service", "uninstall").exit_code == 1


def test_status_tells_what_systemd_knows(hostler: Hostler, calls: Path, place: Path) -> None:
    assert "hostler service install" in hostler("service", "status").output
    (place / "shown").write_text(
        "LoadState=loaded\nActiveState=active\nSubState=running\nResult=success\nUnitFileState=enabled\nMainPID=77\n"
        "NRestarts=2\nStatusText=serving\nMemoryCurrent=1073741824\nMemoryMax=infinity\nFragmentPath=/x/hostler.service\n"
        "ExecStart={ path=/v/hostler ; argv[]=/v/hostler serve --port 9000 ; pid=77 }\nStateChangeTimestamp=Mon\n"
    )
    result = hostler("service", "status")
    assert result.exit_code == 0, result.output
    assert "active (running) since Mon" in result.output
    assert "pid 77  port 9000  memory 1.0 GiB  restarts 2" in result.output
    assert "ends when you log out" in result.output
    (place / "shown").write_text("LoadState=loaded\nActiveState=failed\nSubState=failed\nResult=watchdog\nMainPID=0\n")
    result = hostler("service", "status")
    assert result.exit_code == 1
    assert "failed (failed, watchdog)" in result.output


def test_memory_that_is_not_counted_is_not_shown() -> None:
    assert showing._number("[not set]") is None
    assert showing._number(str(2**64 - 1)) is None
    assert showing._number("5") == 5


def test_a_failed_start_says_where_its_output_is(
    hostler: Hostler, calls: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "shown").write_text("LoadState=loaded\nActiveState=failed\n")
    monkeypatch.setenv("RESTART_EXIT", "1")
    result = hostler("service", "restart")
    assert result.exit_code == 1
    assert "journalctl --user -u hostler" in result.output


def test_every_flag_of_serve_is_understood() -> None:
    assert control.flags_of(("a", "b", "--device", "cpu0=1GiB", "--allowed-host", "x")) == settings.Flags(
        models=("a", "b"), devices=("cpu0=1GiB",), allowed_hosts=("x",)
    )
    assert {field.name for field in fields(settings.Flags)} == set(vars_of(control.flags_of(())))
    with pytest.raises(UsageError, match="hostler serve"):
        control.flags_of(("--port", "x"))


def vars_of(flags: settings.Flags) -> dict[str, object]:
    return {field.name: getattr(flags, field.name) for field in fields(flags)}


def test_a_system_service_needs_a_user_that_is_not_root(hostler: Hostler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUDO_USER", raising=False)
    monkeypatch.setenv("LOGNAME", "root")
    assert "--account" in hostler("service", "install", "--system", "--print").output
    result = hostler("service", "install", "--system", "--account", "no-such-user", "--print")
    assert "there is no account 'no-such-user'" in result.output
    assert "--account goes with --system" in hostler("service", "install", "--account", "x", "--print").output


@pytest.mark.parametrize(
    ("word", "as_systemd_reads_it"),
    [
        ("plain-1.0@x", "plain-1.0@x"),
        ("50%", "50%%"),
        ("$HOME", '"$$HOME"'),
        ("a b", '"a b"'),
        ('say "x"', '"say \\"x\\""'),
        ("back\\slash", '"back\\\\slash"'),
        ("", '""'),
        (";", '";"'),
    ],
)
def test_words_reach_the_command_as_they_are(word: str, as_systemd_reads_it: str) -> None:
    assert quoted(word) == as_systemd_reads_it


def test_a_user_unit_asks_for_nothing_that_needs_namespaces() -> None:
    unit = Unit("h", "user", ("/x",), ("/x",), 1, Path("/d"), Path("/e"))
    written = text(unit)
    for key in ("ProtectSystem", "ProtectHome", "PrivateTmp", "PrivateDevices", "CapabilityBoundingSet", "User="):
        assert key not in written
    assert "NoNewPrivileges=yes" in written


def test_a_service_of_the_machine_is_found_without_being_told_where(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOSTLER_RUN_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place / "own"))
    monkeypatch.setattr(rundir, "SERVICES_DIR", place / "run")
    for path in ("own/hostler/8001", "run/hostler/8000", "run/hostler-two/8002", "run/other/8003"):
        (place / path).mkdir(parents=True)
    assert [port for port, _ in rundir.existing()] == [8000, 8001, 8002]
    monkeypatch.setenv("HOSTLER_RUN_DIR", str(place / "own" / "hostler"))
    assert [port for port, _ in rundir.existing()] == [8001]


@pytest.mark.parametrize(
    ("environment", "group", "unit"),
    [
        ("SYSTEMD_EXEC_PID=77", "0::/user.slice/app.slice/hostler.service", "hostler.service"),
        (
            "SYSTEMD_EXEC_PID=76",
            "0::/user.slice/app.slice/gnome-terminal-server.service",
            None,
        ),  # started in a terminal
        ("HOME=/", "0::/user.slice/app.slice/hostler.service", None),
        ("SYSTEMD_EXEC_PID=77", "0::/user.slice/session-1.scope", None),
    ],
)
def test_only_the_main_process_of_a_unit_is_called_by_its_name(
    place: Path, environment: str, group: str, unit: str | None
) -> None:
    process = place / "proc" / "77"
    process.mkdir(parents=True)
    (process / "environ").write_bytes(f"PATH=/bin\0{environment}\0".encode())
    (process / "cgroup").write_text(f"1:name=systemd:/x\n{group}\n")
    assert servers.unit_of(77, place / "proc") == unit
    assert servers.unit_of(78, place / "proc") is None


def test_the_machines_service_has_a_name_by_which_it_is_found(
    hostler: Hostler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    result = hostler("service", "install", "--system", "--account", "daemon", "--name", "models", "--print")
    assert "must be called hostler" in result.output
    printed = hostler(
        "service", "install", "--system", "--account", "daemon", "--name", "hostler-two", "--print"
    ).output
    assert "RuntimeDirectory=hostler-two\n" in printed
    assert "Environment=HOSTLER_RUN_DIR=%t/hostler-two\n" in printed


def test_a_control_character_could_begin_another_setting() -> None:
    with pytest.raises(UsageError, match="control character"):
        quoted("x\nExecStartPre=/bin/evil")
    assert quoted("A=$x", is_command=False) == '"A=$x"'


@pytest.mark.parametrize("size", ["48 G", "-1", "1G\nUser=root"])
def test_a_size_that_is_none_is_refused(hostler: Hostler, calls: Path, place: Path, size: str) -> None:
    result = hostler("service", "install", f"--memory-max={size}")
    assert result.exit_code == 2
    assert "no size" in result.output
    assert not unit_file(place).exists()


def test_a_stop_may_take_longer_than_the_drain(hostler: Hostler, place: Path) -> None:
    (place / "my.yaml").write_text("drain_s: 300\n")
    assert "TimeoutStopSec=345\n" in hostler("service", "install", "--print", "--", "--config", "my.yaml").output


def test_what_names_caches_goes_along_and_may_be_written_to(hostler: Hostler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/srv/hub")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.chdir("/")
    printed = hostler(
        "service", "install", "--print", "--system", "--account", "daemon", "--writable", "/srv/a b"
    ).output
    assert "Environment=HF_HOME=/srv/hub\n" in printed
    assert "hf_secret" not in printed
    (writable,) = [line for line in printed.splitlines() if line.startswith("ReadWritePaths=")]
    assert writable.endswith(' -/srv/hub "-/srv/a b"')


@pytest.mark.parametrize(
    "line",
    [
        "OOMPolicy=continue",  # else one worker that is killed for memory ends the whole service
        "KillMode=mixed",  # else SIGTERM goes to all processes at once, and none of them drains
        "RuntimeDirectoryPreserve=yes",  # else its logs go with it, and those of another server, too
        "LimitCORE=0",  # a dump would hold prompts
    ],
)
@pytest.mark.parametrize("scope", ["user", "system"])
def test_what_a_server_could_not_do_without_is_in_both_units(scope: Scope, line: str) -> None:
    assert line in text(Unit("h", scope, ("/x",), ("/x",), 1, Path("/d"), Path("/e"))).splitlines()
