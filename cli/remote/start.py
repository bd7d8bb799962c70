"""Starts a server at the far side so that it outlives the connection, and shows how far it is.

Above: `remote`; below: `ssh`, `far_side`. With a systemd user manager it becomes a service (`hostler service`), else
a process of a session of its own with a log.
"""

from __future__ import annotations

import subprocess
import threading

from cli.exits import CliError
from cli.remote import far_side, ssh
from cli.report import Reporter

_START = (
    far_side.FIND
    + """
service() {
  systemctl --user show-environment >/dev/null 2>&1 && "$hostler" service --help >/dev/null 2>&1
}
as_service() {
  say start=service
  if systemctl --user cat hostler.service >/dev/null 2>&1; then
    "$hostler" service start 2>&1 | sed 's/^/@hostler says=/'
  else
    "$hostler" service install --linger $dashes $port_flag $port 2>&1 | sed 's/^/@hostler says=/'
  fi
  while :; do
    state=$(systemctl --user show --property=ActiveState hostler.service)
    case $state in
      ActiveState=active) say ready=1; return ;;
      ActiveState=activating|ActiveState=reloading) sleep 1 ;;
      *) journalctl --user --unit=hostler --lines=5 --output=cat 2>/dev/null | sed 's/^/@hostler says=/'
         say "failed=$state"; return ;;
    esac
  done
}
detached() {
  umask 077
  folder=${XDG_STATE_HOME:-$HOME/.local/state}/hostler
  log=$folder/serve.log
  mkdir -p "$folder" || { say "failed=$folder cannot be made"; return; }
  if [ -f "$log" ]; then mv "$log" "$log.1"; fi
  : >"$log"
  alone=
  if command -v setsid >/dev/null 2>&1; then alone=setsid; fi
  nohup $alone "$hostler" serve $port_flag $port >"$log" 2>&1 </dev/null &
  pid=$!
  say start=detached
  say "pid=$pid"
  say "log=$log"
  shown=0
  while :; do
    if kill -0 "$pid" 2>/dev/null; then lives=1; else lives=; fi
    ready=
    if grep -q '^Serving on ' "$log"; then ready=1; fi
    total=$(wc -l <"$log")
    if [ "$total" -gt "$shown" ]; then
      sed -n "$((shown + 1)),$((total))p" "$log" | sed 's/^/@hostler says=/'
      shown=$((total))
    fi
    if [ -n "$ready" ]; then say ready=1; return; fi
    if [ -z "$lives" ]; then say failed=ended; return; fi
    sleep 1
  done
}
start() {
  find_hostler
  port_flag=
  dashes=
  if [ -n "$port" ]; then port_flag=--port dashes=--; fi
  if service; then as_service; else detached; fi
}
start </dev/null
"""
)


def start(route: ssh.Route, program: str, port: int | None, report: Reporter) -> None:
    """Start a server and wait until it is ready; its own words are shown as they come.

    Raises:
        CliError: it did not come up; says where its log is.
    """
    script = ssh.with_values(_START, given=program, port=str(port) if port else "")
    host = route.destination
    told: dict[str, str] = {}
    with subprocess.Popen(
        ssh.script_command(route),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise AssertionError("pipes were asked for")
        errors: list[str] = []
        reader = threading.Thread(target=errors.extend, args=(process.stderr,), daemon=True)
        reader.start()
        process.stdin.write(script)
        process.stdin.close()
        for line in process.stdout:
            for name, value in far_side.marked(line):
                told[name] = value
                _show(name, value, host, report)
        status = process.wait()
        reader.join(timeout=5)
    if "ready" not in told:
        if "failed" not in told:
            reason = ssh.failure_of(route, status, "".join(errors)).text
            raise CliError(f"the connection ended while the server was coming up: {reason}; run this again")
        where = f"; its log is {told['log']} there" if "log" in told else f"; `ssh {host} journalctl --user -u hostler`"
        raise CliError(f"the server on {host} did not come up{where}")
    report.say("started", f"started on {host}; to stop it: {how_to_stop(host, told)}", stop=how_to_stop(host, told))


def how_to_stop(host: str, told: dict[str, str]) -> str:
    """Return the command that stops what was started."""
    if told.get("start") == "service":
        return f"ssh {host} systemctl --user stop hostler"
    return f"ssh {host} kill {told.get('pid', 'PID')}"


def _show(name: str, value: str, host: str, report: Reporter) -> None:
    if name == "says" and value.strip():
        report.say("far_side", f"  {host}: {value}", "dim", host=host, line=value)
    elif name == "start":
        how = "as a service of its systemd user manager" if value == "service" else "as a process of its own"
        report.say("starting", f"starting hostler on {host}, {how}", host=host, how=value)
