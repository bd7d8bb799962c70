"""The machine's unit under a real systemd: process 1 of namespaces of its own, which knows this unit and nothing else.

What it could touch of this machine is out of its sight (units, generators, /run) or read-only (/proc/sys).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.journeys.server import free_port

from .test_units import CONFIG, ROOT, control_groups, why_not  # noqa: F401  (a fixture)

BOOT = """\
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mount --bind /proc/sys /proc/sys
mount -o remount,ro,bind /proc/sys
for base in /etc/systemd /usr/lib/systemd /lib/systemd /usr/local/lib/systemd; do
  for kind in system system-generators system-environment-generators; do
    if [ -d $base/$kind ]; then mount -t tmpfs tmpfs $base/$kind; fi
  done
done
cd /etc/systemd/system
for target in sysinit basic shutdown multi-user network-online; do
  printf '[Unit]\\nDefaultDependencies=no\\n' > $target.target
done
printf '[Unit]\\nDefaultDependencies=no\\nWants=hostler.service session.service\\n' > default.target
cp "$1/hostler.service" .
mkdir hostler.service.d
cp "$1/hostler.yaml" /run  # the unit has a /tmp of its own
cat > hostler.service.d/test.conf <<END
[Service]
Environment=PYTHONPATH=$PYTHONPATH
BindReadOnlyPaths=${PYTHONPATH%%:*}
StandardOutput=append:$1/serve.out
StandardError=append:$1/serve.out
END
cat > session.service <<END
[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
TimeoutStartSec=200
Environment=PYTHONPATH=$PYTHONPATH SERVE_PORT=$SERVE_PORT
ExecStart=$PYTHON $1/session.py
ExecStopPost=systemctl poweroff --force --force
StandardOutput=append:$1/seen
StandardError=append:$1/session.err
END
export container=unshare
exec /lib/systemd/systemd --system --log-target=console --show-status=no
"""

SESSION = """\
import json, os, subprocess, sys, time, urllib.request

def run(*words):
    return subprocess.run(words, capture_output=True, text=True, timeout=90)

def hostler(*words):
    done = run(sys.executable, "-m", "cli.main", *words)
    return {"code": done.returncode, "out": done.stdout, "err": done.stderr}

def may_write(pid, path):
    trace = f"{path}/hostler-was-here"
    done = run("nsenter", "-m", "-t", str(pid), "sh", "-c", f": > {trace} && rm {trace}")
    return "yes" if done.returncode == 0 else "no: " + done.stderr

port = os.environ["SERVE_PORT"]
seen = {"start": run("systemctl", "start", "hostler").returncode}
seen["status"] = hostler("service", "status", "--system", "--json")
pid = json.loads(seen["status"]["out"])["pid"]
seen["ps"] = hostler("ps", "--json", "--port", port)
question = {"model": "scripted", "messages": [{"role": "user", "content": "[[tokens=3]]"}]}
request = urllib.request.Request(
    f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(question).encode(), {"content-type": "application/json"}
)
with urllib.request.urlopen(request, timeout=60) as answer:
    seen["tokens"] = json.load(answer)["usage"]["completion_tokens"]
with open(f"/proc/{pid}/status") as file:
    seen["process"] = dict(line.rstrip().partition(":\\t")[::2] for line in file)
seen["writes"] = {path: may_write(pid, path) for path in ("/usr", "/etc", "/root", "/root/.cache", "/tmp")}
seen["reload"] = run("systemctl", "reload", "hostler").returncode
seen["stop"] = hostler("service", "stop", "--system")
seen["left"] = os.listdir(f"/run/hostler/{port}/logs")
print(json.dumps(seen), flush=True)
"""


@pytest.mark.journey
@pytest.mark.timeout(300)
@pytest.mark.skipif(why_not() != "", reason=why_not() or "-")
def test_a_real_systemd_runs_the_machines_unit_and_fences_it_in(
    tmp_path: Path,
    control_groups: list[Path],  # noqa: F811
) -> None:
    port = free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HOSTLER_")}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}", "PYTHON": sys.executable, "SERVE_PORT": str(port)}
    (tmp_path / "hostler.yaml").write_text(CONFIG, encoding="utf-8")
    (tmp_path / "session.py").write_text(SESSION, encoding="utf-8")
    (tmp_path / "boot.sh").write_text(BOOT, encoding="utf-8")
    command = [sys.executable, "-m", "cli.main", "service", "install", "--system", "--account", "root", "--print"]
    written = tmp_path / "hostler.yaml"
    printed = subprocess.run(
        [*command, "--", "--port", str(port), "--config", str(written)],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.count(str(written)) == 1
    (tmp_path / "hostler.service").write_text(printed.replace(str(written), "/run/hostler.yaml"), encoding="utf-8")
    enter = "".join(f"echo $$ > {group}/cgroup.procs; " for group in control_groups)
    namespaces = f"exec unshare -m -p -u -i -C --mount-proc -f --kill-child sh {tmp_path}/boot.sh {tmp_path}"
    done = subprocess.run(
        ["sh", "-c", enter + namespaces], capture_output=True, text=True, timeout=280, check=False, env=environment
    )
    files = [tmp_path / name for name in ("serve.out", "session.err") if (tmp_path / name).exists()]
    story = done.stdout + done.stderr + "".join(path.read_text() for path in files)
    assert (tmp_path / "seen").exists(), story
    seen = json.loads((tmp_path / "seen").read_text() or "null")
    assert seen is not None, story
    assert seen["start"] == 0, story
    assert json.loads(seen["status"]["out"])["state"] == "active"
    assert json.loads(seen["ps"]["out"])["unit"] == "hostler.service", seen["ps"]
    assert seen["tokens"] == 3
    process = seen["process"]
    assert {process[key] for key in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16}
    assert (process["NoNewPrivs"], process["Seccomp"]) == ("1", "2")
    assert {path: answer.split(":")[0] for path, answer in seen["writes"].items()} == {
        "/usr": "no",
        "/etc": "no",
        "/root": "no",
        "/root/.cache": "yes",
        "/tmp": "yes",  # its own
    }
    assert "Read-only file system" in seen["writes"]["/usr"]
    assert seen["reload"] == 0
    assert seen["stop"]["code"] == 0
    assert "gateway-0.log" in seen["left"]
    assert not Path("/usr/hostler-was-here").exists()
