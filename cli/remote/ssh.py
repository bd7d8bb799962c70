"""What is said to ssh, and what its words mean. Pure. Above: `far_side`, `start`, `forward`; below: nothing.

Hosts, users, jumps, keys and passwords are ssh's business (`~/.ssh/config`, agents): hostler only runs it. The far
side is given a script on standard input of `sh -s`, so no word of the user's ever stands in a remote command line.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from cli.exits import UsageError

CONNECT_TIMEOUT_S = 15
ALIVE_EVERY_S = 10
ALIVE_MISSES = 3
SSH_FAILED = 255
"""Exit status of ssh for its own failures; others are the remote command's."""

_SOCKET_PATH = re.compile(r"/[A-Za-z0-9/._+-]+")


class Kind(Enum):
    """Why ssh ended, as far as it matters what to do next."""

    HOST_KEY_UNKNOWN = "host_key_unknown"
    HOST_KEY_CHANGED = "host_key_changed"
    DENIED = "denied"
    NO_SUCH_HOST = "no_such_host"
    UNREACHABLE = "unreachable"
    PORT_TAKEN = "port_taken"
    OPTION = "option"
    LOST = "lost"


_FINAL = frozenset({Kind.HOST_KEY_UNKNOWN, Kind.HOST_KEY_CHANGED, Kind.DENIED, Kind.OPTION})

# Words of OpenSSH's client, the more telling first.
_WORDS = (
    ("REMOTE HOST IDENTIFICATION HAS CHANGED", Kind.HOST_KEY_CHANGED),
    ("Host key verification failed", Kind.HOST_KEY_UNKNOWN),
    ("Permission denied", Kind.DENIED),
    ("Too many authentication failures", Kind.DENIED),
    ("Could not resolve hostname", Kind.NO_SUCH_HOST),
    ("Address already in use", Kind.PORT_TAKEN),
    ("cannot listen to port", Kind.PORT_TAKEN),
    ("Bad configuration option", Kind.OPTION),
    ("command-line: line", Kind.OPTION),
    ("Connection refused", Kind.UNREACHABLE),
    ("timed out", Kind.UNREACHABLE),
    ("No route to host", Kind.UNREACHABLE),
    ("Network is unreachable", Kind.UNREACHABLE),
)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why ssh ended, in words; `is_final` if trying again would end the same way."""

    kind: Kind
    text: str

    @property
    def is_final(self) -> bool:
        """Return whether only the user can mend it."""
        return self.kind in _FINAL


@dataclass(frozen=True, slots=True)
class Route:
    """How ssh reaches the far side.

    Args:
        destination: `[user@]host`, a name of ~/.ssh/config, or `ssh://[user@]host[:port]`.
        options: for `ssh -o`, e.g. `Port=2222`.
        program: the ssh to run.
    """

    destination: str
    options: tuple[str, ...] = ()
    program: str = "ssh"

    def __post_init__(self) -> None:
        """Refuse what ssh would take for something else. Raises UsageError."""
        name = self.destination.rpartition("@")[2]
        if not name or "-" in (name[0], self.destination[0]) or not _is_one_word(self.destination):
            raise UsageError(f"{self.destination!r} is no host; give [user@]host or a name of your ~/.ssh/config")
        for option in self.options:
            if "=" not in option or option.startswith("-") or not option.isprintable():
                raise UsageError(f"--ssh-option {option!r} should look like Port=2222 or IdentityFile=~/.ssh/key")


def _is_one_word(text: str) -> bool:
    return text.isprintable() and not any(letter.isspace() for letter in text)


def script_command(route: Route) -> list[str]:
    """Return the command that runs a script, given on standard input, at the far side. It may ask for a password."""
    usual = (*route.options, f"ConnectTimeout={CONNECT_TIMEOUT_S}")  # of two values ssh takes the first
    return [route.program, "-T", *_options(usual), "--", route.destination, "sh", "-s"]


def forward_command(route: Route, local_port: int, target: str, *, batch: bool) -> list[str]:
    """Return the command that forwards a local port and runs nothing at the far side.

    Args:
        target: one of `targets_of`.
        batch: ask the user nothing; fail instead.
    """
    usual = [
        *route.options,
        f"ConnectTimeout={CONNECT_TIMEOUT_S}",
        "ExitOnForwardFailure=yes",
        f"ServerAliveInterval={ALIVE_EVERY_S}",
        f"ServerAliveCountMax={ALIVE_MISSES}",
        # A connection of its own: in a shared one the forward would stay after us, and end with somebody else's.
        "ControlMaster=no",
        "ControlPath=none",
        "ForwardAgent=no",
        *(["BatchMode=yes"] if batch else []),
    ]
    where = f"127.0.0.1:{local_port}:{target}"
    return [route.program, "-N", "-T", *_options(usual), "-L", where, "--", route.destination]


def _options(options: Sequence[str]) -> list[str]:
    return [word for option in options for word in ("-o", option)]


def targets_of(socket_path: str | None, host: str, port: int) -> tuple[str, ...]:
    """Return the far ends to try: the server's Unix socket if it has one that ssh can name, then its port."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    by_port = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if socket_path and _SOCKET_PATH.fullmatch(socket_path):
        return socket_path, by_port
    return (by_port,)


def with_values(script: str, **values: str) -> str:
    """Return a script that begins by setting shell variables, quoted.

    Raises:
        UsageError: a value holds what has no place in a path or a number.
    """
    for name, value in values.items():
        if not value.isprintable():
            raise UsageError(f"{name} is {value!r}, which holds control characters")
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items()) + script


def failure_of(route: Route, exit_status: int, errors: str) -> Failure:
    """Return why ssh ended, from its exit status and standard error."""
    host = route.destination
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    last = lines[-1] if lines else f"ssh ended with {exit_status}"
    kind, told = Kind.LOST, last
    for words, found in _WORDS:
        telling = [line for line in lines if words in line]
        if telling:
            kind, told = found, telling[-1]
            break
    texts = {
        Kind.HOST_KEY_CHANGED: f"the host key of {host} is not the one that you know: find out why before you go on "
        f"(`ssh {host}` tells more; `ssh-keygen -R` forgets the old one)",
        Kind.HOST_KEY_UNKNOWN: f"the host key of {host} is not known here: connect once with `ssh {host}`, compare the "
        "key and accept it",
        Kind.DENIED: f"{host} does not let you in ({told}); `ssh {host}` must work first",
        Kind.NO_SUCH_HOST: f"{host} is not found ({told}); is the name right, and in DNS or your ~/.ssh/config?",
        Kind.UNREACHABLE: f"{host} cannot be reached ({told}); is it on, and is the port right (--ssh-option Port=N)?",
        Kind.PORT_TAKEN: f"the local port is taken ({told}); choose another with --port",
        Kind.OPTION: f"ssh does not understand an option: {told}",
        Kind.LOST: told,
    }
    return Failure(kind, texts[kind])
