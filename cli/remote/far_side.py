"""The look at the far side: one call of ssh that finds hostler, its running servers and the GPUs.

Above: `remote`; below: `ssh`. The script is plain POSIX sh; what it tells stands in lines that begin with a mark, so
that greetings and noise of login scripts do no harm.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cli.exits import CliError
from cli.remote import ssh

LISTING_VERSION = 1
"""Of the JSON of `hostler servers --json`; the far side may have another hostler than we are."""

_MARK = "@hostler "

# Sets $hostler to the program, or to nothing. $given is what the user named.
FIND = """
say() { printf '@hostler %s\\n' "$1"; }
find_hostler() {
  case $given in '~/'*) given=$HOME/${given#'~/'} ;; esac
  # A login over ssh may lack it where a desktop or a service has it: both must find the same servers.
  if [ -z "${XDG_RUNTIME_DIR:-}" ] && [ -d "/run/user/$(id -u)" ]; then
    XDG_RUNTIME_DIR=/run/user/$(id -u)
    export XDG_RUNTIME_DIR
  fi
  hostler=
  if [ -n "$given" ]; then
    hostler=$(command -v "$given" || :)
    return
  fi
  hostler=$(command -v hostler || :)
  for place in "$HOME/.local/bin" "$HOME/hostler/.venv/bin" "$HOME/.venv/bin" /opt/hostler/bin /usr/local/bin; do
    if [ -z "$hostler" ] && [ -x "$place/hostler" ]; then hostler=$place/hostler; fi
  done
}
"""

# Everything is read before anything runs: a command that reads standard input would eat the rest of the script.
_LOOK = (
    FIND
    + """
look() {
  find_hostler
  say "system=$(uname -sm)"
  if command -v nvidia-smi >/dev/null 2>&1; then
    nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | sed 's/^/@hostler gpu=/'
  fi
  if [ -z "$hostler" ]; then return; fi
  say "hostler=$hostler"
  if said=$("$hostler" servers --json $with_key 2>/dev/null); then
    say "servers=$said"
  else
    say "trouble=$("$hostler" servers --json 2>&1 | tail -n 1)"
  fi
}
look </dev/null
"""
)


@dataclass(frozen=True, slots=True)
class FarServer:
    """A server that runs at the far side. `api_key` only if it was asked for."""

    port: int
    host: str
    socket: str | None
    models: tuple[str, ...]
    needs_key: bool
    api_key: str | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """The far ends of a forward to it, in the order to try them."""
        return ssh.targets_of(self.socket, self.host, self.port)


@dataclass(frozen=True, slots=True)
class FarSide:
    """What was found: `program` is None without hostler; `trouble` is its own word why it tells nothing."""

    system: str = ""
    gpus: tuple[str, ...] = ()
    program: str | None = None
    version: str = ""
    servers: tuple[FarServer, ...] = ()
    trouble: str | None = None


def marked(text: str) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of each marked line."""
    for line in text.splitlines():
        if line.startswith(_MARK):
            name, _, value = line.removeprefix(_MARK).partition("=")
            yield name, value


def parse(text: str) -> FarSide:
    """Return what the script told.

    Raises:
        ValueError: the JSON of its servers is not what this version reads.
    """
    told: dict[str, str] = {}
    gpus = []
    for name, value in marked(text):
        if name == "gpu":
            gpus.append(value.strip())
        else:
            told[name] = value
    listing: dict[str, Any] = json.loads(told["servers"]) if "servers" in told else {}
    if listing and listing.get("version") != LISTING_VERSION:
        raise ValueError(f"it lists its servers in version {listing.get('version')}, this one reads {LISTING_VERSION}")
    try:
        servers = tuple(
            FarServer(
                port=int(each["port"]),
                host=str(each["host"]),
                socket=each["socket"],
                models=tuple(each["models"]),
                needs_key=bool(each["needs_key"]),
                api_key=each.get("api_key"),
            )
            for each in listing.get("servers", ())
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"its list of servers cannot be read ({error})") from None
    return FarSide(
        system=told.get("system", ""),
        gpus=tuple(gpus),
        program=told.get("hostler"),
        version=str(listing.get("hostler", "")),
        servers=servers,
        trouble=told.get("trouble"),
    )


def look(route: ssh.Route, program: str | None, *, with_key: bool) -> FarSide:
    """Ask the far side. ssh may ask the user for a password, or whether a host key is right.

    Raises:
        CliError: ssh failed, or hostler is not there or cannot tell; says what to do.
    """
    script = ssh.with_values(_LOOK, given=program or "", with_key="--with-key" if with_key else "")
    done = run(route, script)
    if done.returncode == ssh.SSH_FAILED or (done.returncode and _MARK not in done.stdout):
        raise CliError(ssh.failure_of(route, done.returncode, done.stderr).text)
    try:
        found = parse(done.stdout)
    except ValueError as error:
        raise CliError(f"hostler on {route.destination} is of another release: {error}; update the older one") from None
    return checked(found, route.destination, program)


def checked(found: FarSide, host: str, program: str | None) -> FarSide:
    """Return what was found if hostler is there and tells of its servers. Raises CliError that says what to do."""
    if not found.system:
        raise CliError(
            f"{host} ran nothing of what it was told: its login must give a POSIX shell (`ssh {host} sh -s`)"
        )
    if found.program is None:
        if program:
            raise CliError(f"there is no program {program} on {host}; leave --hostler away, or name the right one")
        raise CliError(
            f"hostler is not on {host} (looked in PATH, ~/.local/bin, ~/hostler/.venv/bin, ~/.venv/bin, "
            f"/opt/hostler/bin): install it there (`ssh {host}`, then as its README says), or name it with "
            "--hostler PATH"
        )
    if found.trouble is not None:
        raise CliError(f"{found.program} on {host} does not tell its servers: {found.trouble} (is it too old?)")
    return found


def run(route: ssh.Route, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script at the far side and wait. Raises CliError if there is no ssh here."""
    try:
        return subprocess.run(
            ssh.script_command(route), input=script, capture_output=True, text=True, errors="replace", check=False
        )
    except FileNotFoundError:
        raise CliError(f"{route.program} is not installed here; hostler uses the system's OpenSSH client") from None
