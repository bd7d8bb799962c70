"""A real sshd on loopback with keys of its own, and an account behind it that has a home of its own.

Run as root the account is another user (uid 12345), known to nobody but this sshd: nss_wrapper shows it a passwd file
of the test's. It keeps the right to read everything, for the Python that it runs may lie in root's home. Run as anybody
else the account is that same user with another HOME, as sshd allows without root.

Where sshd is not installed, Debian's packages are fetched and unpacked (not installed) into ~/.cache/hostler/tools/.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.journeys.server import ROOT, free_port, wait_until

TOOLS = Path.home() / ".cache" / "hostler" / "tools" / "openssh"
PACKAGES = ("openssh-server", "libwrap0", "libnss-wrapper")
UID = 12345
_RIGHTS = "+dac_override,+dac_read_search"


@dataclass(frozen=True, slots=True)
class Tools:
    """sshd, and as root what gives it an account: a library, and where its own libraries lie."""

    sshd: str
    libraries: str
    nss_wrapper: str | None


def tools() -> Tools:
    """Return sshd and what it needs; skips the test where that cannot be had."""
    installed = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    is_root = os.getuid() == 0
    if shutil.which("ssh") is None:
        pytest.skip("no ssh on this machine")
    if installed and not is_root:
        return Tools(installed, "", None)
    if not (found := _unpacked()):
        TOOLS.mkdir(parents=True, exist_ok=True)
        for program in ("apt-get", "dpkg"):
            if shutil.which(program) is None:
                pytest.skip(f"no sshd for this user here, and no {program} to get one")
        done = subprocess.run(
            ["apt-get", "download", *PACKAGES], cwd=TOOLS, capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"no sshd for this user here, and none could be fetched: {done.stderr[-200:]}")
        for package in TOOLS.glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(package), "."], cwd=TOOLS, check=True)
        found = _unpacked()
    if not found:
        pytest.skip("the packages of sshd hold no sshd")
    return found


def _unpacked() -> Tools | None:
    wrappers = sorted(TOOLS.glob("usr/lib/*/libnss_wrapper.so"))
    sshd = TOOLS / "usr" / "sbin" / "sshd"
    if not wrappers or not sshd.exists():
        return None
    return Tools(str(sshd), str(wrappers[0].parent), str(wrappers[0]))


@dataclass(frozen=True, slots=True)
class Sshd:
    """A running sshd.

    Attributes:
        folder: keys and configuration; `home` and `run_dir` of the account lie in it.
        user: name of the account.
        port: of 127.0.0.1.
        process: the sshd that listens.
    """

    folder: Path
    user: str
    port: int
    process: subprocess.Popen[bytes]

    @property
    def home(self) -> Path:
        """Home of the account."""
        return self.folder / "home"

    @property
    def run_dir(self) -> Path:
        """HOSTLER_RUN_DIR of the account."""
        return self.folder / "r"

    @property
    def destination(self) -> str:
        """What ssh is given."""
        return f"{self.user}@127.0.0.1"

    def options(self, **changed: str) -> list[str]:
        """Return --ssh-option words that reach it, of nobody's own configuration."""
        usual = {
            "Port": str(self.port),
            "IdentityFile": str(self.folder / "id"),
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": str(self.folder / "known"),
            "StrictHostKeyChecking": "yes",
        }
        return [word for name, value in (usual | changed).items() for word in ("--ssh-option", f"{name}={value}")]

    def put(self, name: str, text: str, mode: int = 0o600) -> None:
        """Write a file into the account's home."""
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)
        _give(self.home)

    def cut(self) -> int:
        """Kill every connection, not what was started in a session of its own; return how many there were."""
        connections = psutil.Process(self.process.pid).children(recursive=True)
        for connection in connections:
            connection.kill()
        return len(connections)

    def freeze(self) -> None:
        """Stop every connection without ending it, as a laptop's sleep or a lost route does."""
        for connection in psutil.Process(self.process.pid).children(recursive=True):
            connection.suspend()


def _knows_penalties() -> bool:
    """Return whether this sshd refuses an address for a while after failures; our tests fail on purpose."""
    told = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=False).stderr
    version = re.search(r"OpenSSH_(\d+)\.(\d+)", told)
    return version is not None and (int(version[1]), int(version[2])) >= (9, 8)


@contextmanager
def running(**more: str) -> Iterator[Sshd]:
    """Run an sshd, with more lines of sshd_config; everything that its account runs is ended with it."""
    found = tools()
    folder = Path(tempfile.mkdtemp(prefix="hd-", dir="/tmp"))  # short: Unix socket paths end at 107 bytes
    for name in ("host", "id", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    is_root = os.getuid() == 0
    user, port = "far" if is_root else getpass.getuser(), free_port()
    host_key = (folder / "host.pub").read_text(encoding="ascii")
    (folder / "known").write_text(f"[127.0.0.1]:{port} {host_key}", encoding="ascii")
    (folder / "none").write_text("", encoding="ascii")
    (folder / "passwd").write_text(f"far:x:{UID}:{UID}::{folder}/home:/bin/sh\n", encoding="ascii")
    (folder / "group").write_text(f"far:x:{UID}:\n", encoding="ascii")
    settings = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "id.pub",
        "StrictModes": "no",
        "UsePAM": "no",
        "PidFile": "none",
        "SetEnv": f"HOME={folder}/home HOSTLER_RUN_DIR={folder}/r PATH=/usr/bin:/bin",
        **({"PerSourcePenalties": "no"} if _knows_penalties() else {}),
        **more,
    }
    (folder / "config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()), encoding="ascii")
    command = [found.sshd, "-D", "-e", "-f", str(folder / "config")]
    environment = {"PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": found.libraries}
    if is_root:
        identity = ["--reuid", str(UID), "--regid", str(UID), "--clear-groups"]
        command = ["setpriv", *identity, "--inh-caps", _RIGHTS, "--ambient-caps", _RIGHTS, *command]
        environment["LD_PRELOAD"] = found.nss_wrapper or ""
        environment["NSS_WRAPPER_PASSWD"], environment["NSS_WRAPPER_GROUP"] = f"{folder}/passwd", f"{folder}/group"
    (folder / "home").mkdir()
    (folder / "r").mkdir(mode=0o700)
    _give(folder)
    with (folder / "sshd.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
    sshd = Sshd(folder, user, port, process)
    try:
        wait_until(lambda: _listens(port) or process.poll() is not None, 20, "sshd")
        assert process.poll() is None, (folder / "sshd.log").read_text(encoding="utf-8")
        yield sshd
    finally:
        sshd.cut()
        process.terminate()
        process.wait(10)
        _end_all_of(sshd.run_dir)
        shutil.rmtree(folder, ignore_errors=True)


def install_hostler(sshd: Sshd, config: str) -> None:
    """Put a `hostler` that runs this checkout into the account's ~/.local/bin, and its configuration where it looks."""
    words = f"exec env PYTHONPATH={ROOT}:{ROOT}/proto {sys.executable} -m cli.main"
    sshd.put(".local/bin/hostler", f'#!/bin/sh\n{words} "$@"\n', 0o700)
    sshd.put(".config/hostler/hostler.yaml", config)


def _give(folder: Path) -> None:
    """Give everything in a folder to the account, if it is another user."""
    if os.getuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, UID, UID, follow_symlinks=False)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _end_all_of(run_dir: Path) -> None:
    left = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HOSTLER_RUN_DIR") == str(run_dir):
                left.append(process)
        except psutil.Error:
            continue
    for process in left:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=5)
