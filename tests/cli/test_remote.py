"""`hostler remote` without sshd: what ssh is told, what its words mean, what is found and started at the far side.

The far side's scripts run for real, in a `sh` of this machine, behind an `ssh` that is a script of ours.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from typer.testing import Result

from cli.exits import CliError, UsageError
from cli.remote import far_side, ssh
from cli.remote.far_side import FarServer, FarSide
from cli.remote.forward import Real
from cli.remote.remote import choose, choose_port
from cli.remote.start import start

from .fakes import FakeServer, News

BOX = ssh.Route("ada@box")
LISTING = {
    "version": 1,
    "hostler": "9.9",
    "servers": [
        {"port": 8000, "host": "127.0.0.1", "socket": "/run/h/8000/gateway.sock", "models": ["tiny"], "needs_key": True}
    ],
}


@pytest.mark.parametrize(
    ("errors", "kind", "is_final"),
    [
        ("No ED25519 host key is known for box.\nHost key verification failed.", ssh.Kind.HOST_KEY_UNKNOWN, True),
        (
            "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
            ssh.Kind.HOST_KEY_CHANGED,
            True,
        ),
        ("ada@box: Permission denied (publickey).", ssh.Kind.DENIED, True),
        ("ssh: Could not resolve hostname box: Name or service not known", ssh.Kind.NO_SUCH_HOST, False),
        ("ssh: connect to host box port 22: Connection refused", ssh.Kind.UNREACHABLE, False),
        ("ssh: connect to host box port 22: Connection timed out", ssh.Kind.UNREACHABLE, False),
        ("bind [127.0.0.1]:8000: Address already in use", ssh.Kind.PORT_TAKEN, False),
        ("command-line: line 0: Bad configuration option: portt", ssh.Kind.OPTION, True),
        ("Timeout, server box not responding.", ssh.Kind.LOST, False),
        ("", ssh.Kind.LOST, False),
    ],
)
def test_the_words_of_ssh_say_whether_to_try_again(errors: str, kind: ssh.Kind, is_final: bool) -> None:
    failure = ssh.failure_of(BOX, 255, errors)
    assert (failure.kind, failure.is_final) == (kind, is_final)
    assert "\n" not in failure.text


@pytest.mark.parametrize("host", ["", "-oProxyCommand=x", "me@-oX", "me@", "a b", "a\nb"])
def test_what_is_no_host_never_reaches_ssh(host: str) -> None:
    with pytest.raises(UsageError, match="is no host"):
        ssh.Route(host)


@pytest.mark.parametrize("option", ["Port", "-v=1", "Port=1\nProxyCommand=x"])
def test_what_is_no_option_never_reaches_ssh(option: str) -> None:
    with pytest.raises(UsageError, match="--ssh-option"):
        ssh.Route("box", (option,))


def test_the_users_options_come_first_for_ssh_takes_the_first() -> None:
    command = ssh.forward_command(ssh.Route("box", ("ServerAliveInterval=2",)), 8000, "/s", batch=True)
    assert command.index("ServerAliveInterval=2") < command.index("ServerAliveInterval=10")
    assert "ControlPath=none" in command  # in a shared connection the forward would stay after us
    assert command[-4:] == ["-L", "127.0.0.1:8000:/s", "--", "box"]


@pytest.mark.parametrize(
    ("path", "host", "targets"),
    [
        ("/run/h/8000/gateway.sock", "127.0.0.1", ("/run/h/8000/gateway.sock", "127.0.0.1:8000")),
        (None, "127.0.0.1", ("127.0.0.1:8000",)),
        (None, "0.0.0.0", ("127.0.0.1:8000",)),
        (None, "::", ("[::1]:8000",)),
        ("/run/a:b/${HOME}/gateway.sock", "10.0.0.7", ("10.0.0.7:8000",)),
    ],
)
def test_the_far_end_is_the_socket_if_ssh_can_name_it_else_the_port(
    path: str | None, host: str, targets: tuple[str, ...]
) -> None:
    assert ssh.targets_of(path, host, 8000) == targets


def test_what_the_far_side_tells_is_read_past_the_noise_of_its_login() -> None:
    told = ("system=Linux x86_64", "gpu=NVIDIA H200", "hostler=/h", f"servers={json.dumps(LISTING)}")
    text = "Welcome!\n" + "".join(f"@hostler {line}\n" for line in told)
    found = far_side.parse(text)
    server = FarServer(8000, "127.0.0.1", "/run/h/8000/gateway.sock", ("tiny",), True)
    assert found == FarSide("Linux x86_64", ("NVIDIA H200",), "/h", "9.9", (server,))


@pytest.mark.parametrize("listing", ['{"version": 2, "servers": []}', '{"version": 1, "servers": [{}]}'])
def test_a_list_of_another_release_is_refused_in_words(listing: str) -> None:
    with pytest.raises(ValueError, match="servers"):
        far_side.parse(f"@hostler servers={listing}")


def running(port: int) -> FarServer:
    return FarServer(port, "127.0.0.1", None, ("tiny",), False)


def test_one_server_is_meant_by_itself_several_must_be_told_apart() -> None:
    one, two = FarSide(servers=(running(8000),)), FarSide(servers=(running(8000), running(8001)))
    assert choose(one, None, "box").port == 8000
    assert choose(two, 8001, "box").port == 8001
    with pytest.raises(CliError, match=r"ports 8000, 8001.*--remote-port"):
        choose(two, None, "box")
    with pytest.raises(CliError, match="no hostler is running on port 9 of box"):
        choose(one, 9, "box")
    with pytest.raises(CliError, match="hostler remote box --start"):
        choose(FarSide(), None, "box")


def test_a_taken_port_is_refused_if_asked_for_and_passed_over_if_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CliError, match="is taken"):
            choose_port(port, 8000, Real())
        assert choose_port(None, port, Real()) > port


FAKE_SSH = """#!/bin/sh
# The far side is this machine; HOME is its own.
printf '%s\\n' "$@" > "$FAR/arguments"
if [ -f "$FAR/refuses" ]; then cat "$FAR/refuses" >&2; exit 255; fi
case $* in *" sh -s") HOME="$FAR" PATH="$FAR/path:/usr/bin:/bin" XDG_STATE_HOME= exec sh -s ;; esac
exec sleep 1000
"""


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of the far side; `put` gives it programs."""
    home = tmp_path / "far"
    (home / "path").mkdir(parents=True)
    monkeypatch.setenv("FAR", str(home))
    put(tmp_path / "bin" / "ssh", FAKE_SSH)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return home


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


FAKE_HOSTLER = """#!/bin/sh
case $1 in
  servers) echo "$@" >> "$HOME/asked"; cat "$HOME/listing" ;;
  serve) echo $$ > "$HOME/served"; shift; echo "hostler serves $*"; echo; echo "Serving on http://x/v1 (ready)"
         exec sleep 1000 ;;
esac
"""


def test_hostler_is_found_where_it_usually_is_and_asked_for_its_servers(far: Path) -> None:
    for place in ("hostler/.venv/bin", ".local/bin", "path"):
        put(far / place / "hostler", FAKE_HOSTLER)
        (far / "listing").write_text(json.dumps(LISTING))
        found = far_side.look(BOX, None, with_key=False)
        assert found.program == str(far / place / "hostler")
        assert [each.port for each in found.servers] == [8000]
    assert (far / "asked").read_text().splitlines() == ["servers --json"] * 3
    assert (far / "arguments").read_text().splitlines()[-4:] == ["--", "ada@box", "sh", "-s"]


def test_a_program_that_is_named_is_never_a_piece_of_the_script(far: Path) -> None:
    evil = f"x'; touch {far}/harmed; echo '$(touch {far}/harmed)"
    with pytest.raises(CliError, match="there is no program"):
        far_side.look(BOX, evil, with_key=False)
    with pytest.raises(UsageError, match="control characters"):
        far_side.look(BOX, f"x\ntouch {far}/harmed", with_key=False)
    assert not (far / "harmed").exists()
    put(far / "own" / "hostler", FAKE_HOSTLER)
    (far / "listing").write_text(json.dumps(LISTING))
    assert far_side.look(BOX, "~/own/hostler", with_key=True).program == str(far / "own" / "hostler")
    assert (far / "asked").read_text() == "servers --json --with-key\n"


def test_what_is_lacking_over_there_is_one_line_that_says_what_to_do(far: Path, hostler: Callable[..., Result]) -> None:
    result = hostler("remote", "ada@box")
    assert result.exit_code == 1
    assert "hostler is not on ada@box" in result.stderr
    put(far / "path" / "hostler", "#!/bin/sh\necho \"No such command 'servers'.\" >&2\nexit 2\n")
    assert "does not tell its servers: No such command 'servers'." in hostler("remote", "ada@box").stderr
    put(far / "path" / "hostler", FAKE_HOSTLER)
    (far / "listing").write_text('{"version": 7}')
    assert "is of another release" in hostler("remote", "ada@box").stderr
    (far / "refuses").write_text("Host key verification failed.\n")
    result = hostler("remote", "ada@box")
    assert result.stderr.count("\n") == 1
    assert "the host key of ada@box is not known here" in result.stderr


def test_without_a_user_manager_a_server_is_started_in_a_session_of_its_own(far: Path) -> None:
    put(far / "path" / "hostler", FAKE_HOSTLER)
    put(far / "path" / "systemctl", "#!/bin/sh\nexit 1\n")
    news = News()
    start(BOX, str(far / "path" / "hostler"), 9000, news)
    pid = int((far / "served").read_text())
    try:
        assert os.getsid(pid) == pid
        assert news.events == ["starting", "far_side", "far_side", "started"]
        assert "hostler serves --port 9000" in news.texts[1]
        assert f"ssh ada@box kill {pid}" in news.texts[-1]
        log = far / ".local/state/hostler/serve.log"
        assert stat.S_IMODE(log.stat().st_mode) == 0o600
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_server_that_does_not_come_up_over_there_is_told_with_its_words(far: Path) -> None:
    put(far / "path" / "hostler", "#!/bin/sh\necho 'hostler: port 8000 is taken'\nexit 1\n")
    put(far / "path" / "systemctl", "#!/bin/sh\nexit 1\n")
    news = News()
    with pytest.raises(CliError, match=r"did not come up; its log is .*serve\.log there"):
        start(BOX, str(far / "path" / "hostler"), None, news)
    assert "  ada@box: hostler: port 8000 is taken" in news.texts


FAKE_SYSTEMCTL = """#!/bin/sh
case $2 in
  show) n=$(cat "$HOME/shown" 2>/dev/null || echo 0); echo $((n + 1)) > "$HOME/shown"
        if [ "$n" -gt 0 ]; then echo ActiveState=$(cat "$HOME/comes"); else echo ActiveState=activating; fi ;;
  cat) exit 1 ;;
esac
"""


def test_with_a_user_manager_a_server_is_started_as_its_service(far: Path) -> None:
    put(far / "path" / "systemctl", FAKE_SYSTEMCTL)
    put(far / "path" / "hostler", '#!/bin/sh\nif [ "$2" = install ]; then echo "ran $*"; fi\n')
    (far / "comes").write_text("active")
    news = News()
    start(BOX, str(far / "path" / "hostler"), 9000, news)
    assert news.texts[1] == "  ada@box: ran service install --linger -- --port 9000"
    assert "ssh ada@box systemctl --user stop hostler" in news.texts[-1]
    (far / "comes").write_text("failed")
    with pytest.raises(CliError, match="journalctl --user -u hostler"):
        start(BOX, str(far / "path" / "hostler"), None, news)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGKILL, -9)]
)
def test_however_it_ends_ssh_goes_along(far: Path, number: signal.Signals, status: int) -> None:
    put(far / "path" / "hostler", FAKE_HOSTLER)
    (far / "listing").write_text(json.dumps(LISTING))
    root = str(Path(ssh.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": f"{root}:{root}/proto"}
    # Tests that run in a shell's background inherit that Ctrl-C is ignored; a user's terminal does not do that.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "cli.main", "remote", "ada@box"]
    process = subprocess.Popen(command, env=environment)
    arguments = far / "arguments"
    deadline = time.monotonic() + 30
    while not (arguments.exists() and "-N" in arguments.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(number)
    assert process.wait(20) == status
    assert children
    deadline = time.monotonic() + 20
    while any(map(psutil.pid_exists, map(int, children))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, map(int, children)))


def test_the_list_of_servers_shows_no_key_unless_it_is_asked_for(
    server: FakeServer, hostler: Callable[..., Result]
) -> None:
    path = Path(os.environ["HOSTLER_RUN_DIR"], "8123", "config.json")
    path.write_text(json.dumps({"host": "0.0.0.0", "api_key": "sesame", "models": [{"name": "tiny"}]}))
    listing = json.loads(hostler("servers", "--json").stdout)
    assert listing["version"] == far_side.LISTING_VERSION
    (told,) = listing["servers"]
    assert (told["port"], told["needs_key"], told["models"], told["socket"]) == (8123, True, ["tiny"], None)
    assert "sesame" not in hostler("servers", "--json").stdout + hostler("servers").stdout
    assert json.loads(hostler("servers", "--json", "--with-key").stdout)["servers"][0]["api_key"] == "sesame"
    assert far_side.parse(f"@hostler servers={json.dumps(listing)}").servers[0].targets == ("127.0.0.1:8123",)
