"""Talks to systemd: is there one, what does it know of a unit, have it do something. The only file that runs its tools.

Above stands `cli.service.control`; below, `systemctl` and `loginctl`.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
from pathlib import Path

from cli.exits import CliError
from cli.service.unit import Scope

_SYSTEM_BOOTED = Path("/run/systemd/system")
_LINGERING = Path("/var/lib/systemd/linger")
_ASK_S = 30.0
_START_S = 330.0
"""Longer than the unit's TimeoutStartSec, so that the manager's own verdict is the one that is told."""

INSTEAD = (
    "there is no systemd here. In a container let its restart policy keep `hostler serve` running, on macOS launchd; "
    "`nohup hostler serve &` outlives the terminal"
)


def unit_directory(scope: Scope) -> Path:
    """Return where units of ours belong."""
    if scope == "system":
        return Path("/etc/systemd/system")
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"


def version() -> int:
    """Return systemd's version; 0 where there is none."""
    if shutil.which("systemctl") is None:
        return 0
    found = re.match(r"systemd (\d+)", _run(["systemctl", "--version"], _ASK_S).stdout)
    return int(found[1]) if found else 0


def require(scope: Scope) -> None:
    """Go on only if the manager can be talked to.

    Raises:
        CliError: says what to do instead.
    """
    if shutil.which("systemctl") is None:
        raise CliError(INSTEAD)
    answer = ask(scope, "show", "--property=Version", "--value")
    if answer.returncode == 0 and answer.stdout.strip():
        return
    if scope == "user" and _SYSTEM_BOOTED.is_dir():
        raise CliError(
            "your own service manager does not answer, as after `su` or `sudo -u`: log in as this user, or run "
            f"`sudo loginctl enable-linger {getpass.getuser()}` and set XDG_RUNTIME_DIR=/run/user/{os.getuid()}, "
            "or install with --system"
        )
    raise CliError(INSTEAD)


def ask(scope: Scope, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `systemctl` and return what it said, whatever it said."""
    return _run(["systemctl", f"--{scope}", "--no-pager", *words], _ASK_S)


def do(scope: Scope, *words: str) -> None:
    """Have systemd do something and wait for it; a start is over when the server is ready.

    Raises:
        CliError: it could not, in systemd's words.
    """
    answer = _run(["systemctl", f"--{scope}", *words], _START_S)
    if answer.returncode != 0:
        lines = [line for line in (answer.stderr or answer.stdout).splitlines() if line.strip()]
        raise CliError("\n".join(lines) or f"systemctl {' '.join(words)} failed (exit code {answer.returncode})")


def properties(scope: Scope, name: str, *keys: str) -> dict[str, str]:
    """Return what systemd knows of a unit; of one that it does not know, LoadState is "not-found"."""
    shown = ask(scope, "show", f"{name}.service", f"--property={','.join(keys)}").stdout
    return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)


def require_installed(scope: Scope, name: str) -> None:
    """Go on only if there is such a unit.

    Raises:
        CliError: says how to make one.
    """
    if properties(scope, name, "LoadState").get("LoadState") == "not-found":
        flag = " --system" if scope == "system" else ""
        raise CliError(f"there is no {name}.service; `hostler service install{flag}` makes one")


def lingers(user: str) -> bool:
    """Tell whether a user's services run without the user being logged in."""
    return (_LINGERING / user).exists()


def enable_linger(user: str) -> None:
    """Have a user's services start with the machine and outlive the login.

    Raises:
        CliError: not allowed; says how root does it.
    """
    answer = _run(["loginctl", "enable-linger", user], _ASK_S)
    if answer.returncode != 0:
        raise CliError(f"loginctl refuses ({answer.stderr.strip()}); run `sudo loginctl enable-linger {user}`")


def _run(command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C", "SYSTEMD_COLORS": "0", "SYSTEMD_PAGER": "cat"}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment, errors="replace"
        )
    except FileNotFoundError:
        raise CliError(f"{command[0]} is not installed; {INSTEAD}") from None
    except subprocess.TimeoutExpired:
        raise CliError(f"`{' '.join(command)}` did not end within {timeout_s:.0f} s") from None
