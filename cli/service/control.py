"""What the commands of `hostler service` do: put a unit in place, take it away, start, stop, tell how it is.

Above stands `cli.service_commands`; below, `cli.service.unit` (the text), `cli.service.systemd`, and `cli.settings`,
which checks before anything is written that `hostler serve` could start so.
"""

from __future__ import annotations

import getpass
import os
import pwd
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import typer
from hostler.config import HostlerConfig

from cli import settings
from cli.exits import CliError, UsageError
from cli.service import systemd
from cli.service.unit import MARK, Scope, Unit, text

KEY_VARIABLE = "HOSTLER_API_KEY"
_NEW_ENVIRONMENT = f"""\
# The environment of hostler as a service, one KEY=VALUE a line; read at each start, by nobody but its owner.
#{KEY_VARIABLE}=
#HF_TOKEN=
"""
_PLACES = ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "XDG_DATA_HOME")
_KEPT = (*_PLACES, "HF_ENDPOINT", "CUDA_VISIBLE_DEVICES")
_GPU_TRACES = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/kfd", "/dev/dri")


@dataclass(frozen=True, slots=True)
class Wish:
    """What `hostler service install` was told.

    Args:
        serve: arguments of `hostler serve`.
        account: of a system service, whose it runs as; None: who called sudo.
        writable: further paths that a system service may write to.
        memory_high, memory_max: systemd's sizes.
        with_key: put this shell's $HOSTLER_API_KEY into the environment file.
    """

    scope: Scope
    name: str
    serve: tuple[str, ...] = ()
    account: str | None = None
    writable: tuple[Path, ...] = ()
    memory_high: str | None = None
    memory_max: str | None = None
    with_key: bool = False


def flags_of(arguments: tuple[str, ...]) -> settings.Flags:
    """Return what `hostler serve` would make of its arguments.

    Raises:
        UsageError: it would refuse them, or they hold the key, which everybody could read in the unit.
    """
    from cli.main import app

    serve: Any = typer.main.get_group(app).commands["serve"]
    try:
        parameters = serve.make_context("hostler serve", list(arguments)).params
    except Exception as error:
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        raise UsageError(f"hostler serve: {message()}") from None
    if parameters["api_key"]:
        raise UsageError("--api-key would stand in the unit for all to read; put the key into the environment file")
    values: dict[str, Any] = {}
    for field in fields(settings.Flags):
        given = parameters[field.name if field.name in parameters else field.name.removesuffix("s")]
        values[field.name] = tuple(given or ()) if isinstance(field.default, tuple) else given
    return settings.Flags(**values)


def read_environment(path: Path) -> dict[str, str]:
    """Return the plain KEY=VALUE lines of an environment file; of one that is not there, nothing."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.lstrip().startswith(("#", ";")))
    return {key.strip(): value.strip().strip("\"'") for key, value in pairs}


def plan(wish: Wish, environ: Mapping[str, str]) -> Unit:
    """Return the unit to write, having changed nothing.

    Raises:
        UsageError, ConfigError: `hostler serve` would not start so.
    """
    account = _account(wish)
    home = Path(account.pw_dir) if wish.scope == "system" else Path.home()
    environment_file = _configuration(wish.scope, home) / "env"
    # What the service will see, not what this shell has.
    base = str(home / ".config") if wish.scope == "system" else environ.get("XDG_CONFIG_HOME", "")
    given = {"XDG_CONFIG_HOME": base, **read_environment(environment_file)}
    if wish.with_key:
        if not environ.get(KEY_VARIABLE):
            raise UsageError(f"--with-key takes the key from ${KEY_VARIABLE}, which is empty")
        given[KEY_VARIABLE] = environ[KEY_VARIABLE]
    flags = flags_of(wish.serve)
    try:
        config, _ = settings.resolve(flags, given)
    except UsageError as error:
        # An open door: here the key must not be a flag.
        how = f"put {KEY_VARIABLE}=… into {environment_file}, or set it here and add --with-key"
        raise UsageError(str(error).replace(f"add:  {settings.MAKE_A_KEY}", how)) from None
    kept = _KEPT if wish.scope == "system" else (*_KEPT, "XDG_CONFIG_HOME")
    program = _program()
    port = ("--port", str(config.port))
    directory = Path.cwd()
    if wish.scope == "system" and not wish.name.startswith("hostler"):
        raise UsageError(
            f"the machine's service must be called hostler…, so that `hostler ps` finds it; not {wish.name!r}"
        )
    if wish.scope == "system" and directory.is_relative_to("/tmp"):
        raise UsageError("a system service has a /tmp of its own; install it from another directory")
    unit = Unit(
        name=wish.name,
        scope=wish.scope,
        command=(*program, "serve", *wish.serve, *(() if flags.port else port)),
        reload=(*program, "reload", *port),
        port=config.port,
        directory=directory,
        environment_file=environment_file,
        drain_s=config.drain_s,
        environment=tuple((key, environ[key]) for key in kept if environ.get(key)),
        account=account.pw_name,
        writable=_writable(wish, config, home, environ),
        memory_high=wish.memory_high,
        memory_max=wish.memory_max,
        has_gpu=any(Path(trace).exists() for trace in _GPU_TRACES),
        systemd_version=systemd.version(),
    )
    text(unit)  # what cannot be written is refused now
    return unit


def _account(wish: Wish) -> pwd.struct_passwd:
    if wish.scope == "user":
        if wish.account is not None:
            raise UsageError("--account goes with --system; your own service runs as you")
        return pwd.getpwuid(os.getuid())
    name = wish.account or os.environ.get("SUDO_USER") or getpass.getuser()
    if name == "root" and wish.account is None:
        raise UsageError("models need no root: say with --account whose they are")
    try:
        return pwd.getpwnam(name)
    except KeyError:
        raise UsageError(f"there is no account {name!r}; make it, e.g. with `useradd -m {name}`") from None


def _configuration(scope: Scope, home: Path) -> Path:
    if scope == "system":
        return Path("/etc/hostler")
    return Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "hostler"


def _program() -> tuple[str, ...]:
    beside = Path(sys.executable).with_name("hostler")
    return (str(beside),) if beside.is_file() else (sys.executable, "-P", "-m", "cli.main")


def _writable(wish: Wish, config: HostlerConfig, home: Path, environ: Mapping[str, str]) -> tuple[Path, ...]:
    named = (config.models_dir, config.responses_dir, *wish.writable)
    places = [Path(environ[key]) for key in _PLACES if environ.get(key)]
    paths = [home / ".cache", home / ".local" / "share", *places]
    paths += [path.expanduser().absolute() for path in named if path is not None]
    return tuple(dict.fromkeys(paths))


def install(wish: Wish, *, linger: bool, only_print: bool) -> None:
    """Write the unit, have it started with the machine, and start it.

    Raises:
        UsageError, ConfigError: `hostler serve` would not start so; nothing was written.
        CliError: no systemd, not allowed, a foreign unit of that name, or the server did not start.
    """
    unit = plan(wish, os.environ)
    if only_print:
        typer.echo(text(unit), nl=False)
        return
    if wish.scope == "system" and os.geteuid() != 0:
        raise CliError(f"--system writes to /etc: run `sudo {' '.join(_program())} service install --system …`")
    systemd.require(wish.scope)
    path = _unit_path(wish.scope, wish.name)
    _refuse_foreign(path)
    _write_environment(unit, os.environ[KEY_VARIABLE] if wish.with_key else None)
    if wish.scope == "system":
        _make_cache(pwd.getpwnam(unit.account))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(unit), encoding="utf-8")
    typer.echo(f"wrote {path}")
    systemd.do(wish.scope, "daemon-reload")
    systemd.do(wish.scope, "enable", f"{unit.name}.service")
    if os.environ.get(KEY_VARIABLE) and KEY_VARIABLE not in read_environment(unit.environment_file):
        typer.echo(f"${KEY_VARIABLE} of this shell is not used; --with-key puts it into {unit.environment_file}")
    if wish.scope == "user":
        _see_to_linger(linger)
    systemd.do(wish.scope, "restart", f"{unit.name}.service")
    typer.echo(f"{unit.name}.service serves on port {unit.port}; `hostler service status` shows how it is")


def _see_to_linger(wanted: bool) -> None:
    user = getpass.getuser()
    if systemd.lingers(user):
        return
    if wanted:
        systemd.enable_linger(user)
        typer.echo(f"{user}'s services start with the machine from now on")
    else:
        typer.echo("it ends when you log out, and waits for your login after a reboot; --linger changes that")


def _write_environment(unit: Unit, key: str | None) -> None:
    path = unit.environment_file
    # The machine's directory holds its configuration, too, which the service's account reads; the file is root's alone.
    path.parent.mkdir(mode=0o755 if unit.scope == "system" else 0o700, parents=True, exist_ok=True)
    old = path.read_text(encoding="utf-8") if path.exists() else _NEW_ENVIRONMENT
    if key is not None:
        kept = [line for line in old.splitlines() if not line.lstrip("# ").startswith(f"{KEY_VARIABLE}=")]
        old = "\n".join([*kept, f"{KEY_VARIABLE}={key}"]) + "\n"
    draft = path.with_name(f".{path.name}.new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(old)
    draft.replace(path)


def _make_cache(account: pwd.struct_passwd) -> None:
    """Make what the unit may write to: a path that is missing when it starts stays closed to it."""
    path = Path(account.pw_dir) / ".cache"
    if not path.exists():
        path.mkdir(mode=0o700)
        shutil.chown(path, account.pw_uid, account.pw_gid)


def _unit_path(scope: Scope, name: str) -> Path:
    return systemd.unit_directory(scope) / f"{name}.service"


def _refuse_foreign(path: Path) -> None:
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(MARK):
        raise CliError(f"{path} is not one that hostler wrote; choose another --name, or remove it yourself")


def uninstall(scope: Scope, name: str) -> None:
    """Stop the service and remove its unit; models, configuration and the environment file stay.

    Raises:
        CliError: no systemd, no such unit, or one that is not ours.
    """
    systemd.require(scope)
    path = _unit_path(scope, name)
    if not path.exists():
        raise CliError(f"{path} does not exist; nothing to remove")
    _refuse_foreign(path)
    systemd.do(scope, "disable", "--now", f"{name}.service")
    path.unlink()
    systemd.do(scope, "daemon-reload")
    systemd.ask(scope, "reset-failed", f"{name}.service")
    typer.echo(f"removed {path}")


def order(scope: Scope, name: str, word: str) -> None:
    """Start, stop, restart or reload the service, and wait until that is done.

    Raises:
        CliError: no systemd, not installed, or it failed; says where to look.
    """
    systemd.require(scope)
    systemd.require_installed(scope, name)
    flag = "--user " if scope == "user" else ""
    try:
        systemd.do(scope, word, f"{name}.service")
    except CliError as error:
        raise CliError(f"{error}\nits output: journalctl {flag}-u {name} -n 50") from None
    typer.echo(f"{name}.service: {systemd.properties(scope, name, 'ActiveState').get('ActiveState', 'unknown')}")
