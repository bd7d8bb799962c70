"""Installs, removes and asks the unit, by systemd's own programs. Above: `cli.service_commands`; below: `unit`."""

from __future__ import annotations

import getpass
import json
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import typer

from cli.exits import CliError, UsageError
from cli.service import unit

_KEPT = ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "XDG_CACHE_HOME", "XDG_DATA_HOME", "CUDA_VISIBLE_DEVICES")
_SHOWN = ("LoadState", "ActiveState", "SubState", "StatusText", "MainPID", "NRestarts", "UnitFileState")


def require_systemd(marker: Path = Path("/run/systemd/system")) -> None:
    """Refuse where systemd does not run.

    Raises:
        CliError: it does not; says what to do instead.
    """
    if sys.platform == "darwin":
        raise CliError("macOS has no systemd; run `hostler serve` from a launchd agent instead")
    if not marker.is_dir() or shutil.which("systemctl") is None:
        raise CliError(
            "systemd does not run here (a container?); let what started this machine run `hostler serve` in the "
            "foreground and restart it, e.g. `docker run --restart on-failure`. `--print` shows the unit for elsewhere"
        )


def _systemctl(is_system: bool, *words: str, check: bool = True) -> str:
    command = ["systemctl", *([] if is_system else ["--user"]), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        why = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise CliError(f"`{' '.join(command)}` failed: {why}")
    return done.stdout


def path_of(name: str, is_system: bool) -> Path:
    """Return where the unit's file lies."""
    if is_system:
        return Path("/etc/systemd/system") / f"{name}.service"
    base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return base / "systemd" / "user" / f"{name}.service"


def wish_for(
    name: str, words: list[str], is_system: bool, account: str | None, high: str | None, most: str | None
) -> unit.Wish:
    """Return what to install: `hostler serve` with `words`, by the interpreter that runs this.

    Raises:
        UsageError: a key among the words, or an account that does not exist or is root.
    """
    if any(word == "--api-key" or word.startswith("--api-key=") for word in words):
        file = "/etc/hostler/env" if is_system else "~/.config/hostler/env"
        raise UsageError(f"everybody can read a unit; put HOSTLER_API_KEY=… into {file} (mode 0600) instead")
    if account is not None and not is_system:
        raise UsageError("--account goes with --system; a user's unit runs as that user")
    home = Path.home()
    if is_system:
        account = account or os.environ.get("SUDO_USER") or getpass.getuser()
        if account == "root":
            raise UsageError("hostler should not run as root; name an account with --account")
        try:
            home = Path(pwd.getpwnam(account).pw_dir)
        except KeyError:
            raise UsageError(f"there is no account {account!r}; make it, e.g. with `useradd -m {account}`") from None
    command = (sys.executable, "-P", "-m", "cli.main", "serve", *words)
    kept = tuple((key, os.environ[key]) for key in _KEPT if os.environ.get(key))
    return unit.Wish(name, command, home, account, _drain_s(words), high, most, kept)


def _drain_s(words: list[str]) -> float:
    from cli import settings

    file = None
    for index, word in enumerate(words):
        if word in ("--config", "-c") and index + 1 < len(words):
            file = Path(words[index + 1])
        elif word.startswith("--config="):
            file = Path(word.removeprefix("--config="))
    return settings.resolve(settings.Flags(config=file))[0].drain_s


def install(wish: unit.Wish, *, linger: bool) -> None:
    """Write the unit, start it and have it started at boot."""
    is_system = wish.account is not None
    text = unit.text_of(wish)
    require_systemd()
    path = path_of(wish.name, is_system)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".service.new")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
    _systemctl(is_system, "daemon-reload")
    _systemctl(is_system, "enable", wish.name)
    _systemctl(is_system, "restart", "--no-block", wish.name)
    typer.echo(f"wrote {path}; it starts now and at every boot")
    if is_system:
        typer.echo(f"its run directory is /run/{wish.name}: HOSTLER_RUN_DIR=/run/{wish.name} hostler ps")
    elif linger:
        done = subprocess.run(["loginctl", "enable-linger"], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CliError(f"`loginctl enable-linger` failed: {' '.join(done.stderr.split())}")
    else:
        typer.echo("it ends when you log out; `loginctl enable-linger` (or --linger) lets it run from boot on")


def uninstall(name: str, is_system: bool) -> None:
    """Stop the unit and remove its file. Raises CliError if there is none."""
    require_systemd()
    path = path_of(name, is_system)
    if not path.exists():
        raise CliError(f"{path} does not exist; `hostler service install` would write it")
    _systemctl(is_system, "disable", "--now", name)
    path.unlink()
    _systemctl(is_system, "daemon-reload")
    typer.echo(f"removed {path}")


def act(verb: str, name: str, is_system: bool) -> None:
    """Start, stop or restart the unit. Raises CliError with systemd's words."""
    require_systemd()
    _systemctl(is_system, verb, name)


def status(name: str, is_system: bool, as_json: bool) -> None:
    """Show what systemd knows of the unit; fails if it is not active."""
    require_systemd()
    out = _systemctl(is_system, "show", name, f"--property={','.join(_SHOWN)}")
    found = dict(line.split("=", 1) for line in out.splitlines() if "=" in line)
    if as_json:
        typer.echo(json.dumps({"unit": f"{name}.service", **found}))
    else:
        for key in _SHOWN:
            typer.echo(f"{key:14} {found.get(key, '')}")
    if found.get("ActiveState") != "active":
        raise typer.Exit(1)
