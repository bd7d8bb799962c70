"""Checks of the machine and of what is installed on it. Above: `report`; below: the operating system.

Each reads, changes nothing, and returns findings; nothing here imports torch or Ray.
"""

from __future__ import annotations

import email.utils
import importlib.util
import os
import re
import shutil
import socket
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import httpx

from cli.doctor.finding import Finding, bad, note, ok

GIB = 2**30
LEAST_DISK_BYTES = 2 * GIB
GOOD_DISK_BYTES = 20 * GIB
MOST_SKEW_S = 60.0
_SERVING = ("fastapi", "uvicorn", "ray", "torch", "transformers")
_HUB = "https://huggingface.co"
_HUB_TIMEOUT_S = 5.0
_DRIVER_VERSION = Path("/proc/driver/nvidia/version")
# The least driver for each major version of CUDA, as NVIDIA's release notes on minor-version compatibility say.
_LEAST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
_COMPILERS = ("c++", "g++", "clang++")


def python(current: tuple[int, int] | None = None) -> Finding:
    """Is this Python one that hostler runs on?"""
    major, minor = current or sys.version_info[:2]
    text = f"{major}.{minor} ({sys.executable})"
    if (3, 11) <= (major, minor) <= (3, 14):
        return ok("Python", text)
    return bad("Python", text, "hostler needs Python 3.11 to 3.14; make the environment anew with one of them.")


def packages() -> Finding:
    """Is everything there that serving needs?"""
    found, missing = [], []
    for name in _SERVING:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        advice = "Without them this installation can ask servers, not be one: pip install 'hostler[all]'."
        return bad("packages", f"missing: {', '.join(missing)}", advice)
    return ok("packages", ", ".join(found))


def num_gpus() -> int:
    """Return how many NVIDIA GPUs the driver shows."""
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        return int(Path("/dev/nvidia0").exists())


def torch_cuda() -> str | None:
    """Return the CUDA version that torch was built for ("" for a CPU build); None without torch. Imports nothing."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^cuda[^=\n]*=\s*'([^']*)'", text, re.MULTILINE)
    return match[1] if match else ""


def gpu(gpus: int, cuda: str | None) -> Finding:
    """Do the GPUs and torch's build go together?"""
    if cuda is None:
        return note("GPU", f"{gpus} NVIDIA GPU(s), no torch")
    if gpus and not cuda:
        advice = "Remove .venv and run `make setup` again, or install torch's CUDA build: models run on the CPU now."
        return bad("GPU", f"{gpus} NVIDIA GPU(s), but torch is a CPU build", advice)
    if gpus:
        return ok("GPU", f"{gpus} NVIDIA GPU(s), torch for CUDA {cuda}")
    if cuda:
        return note("GPU", f"none, and torch for CUDA {cuda}", "If there is one, its driver is missing.")
    return ok("GPU", "none; models run on the CPU")


def driver_version(text: str) -> tuple[int, int] | None:
    """Return the NVIDIA driver's version from what the kernel module tells of itself; None if it does not."""
    match = re.search(r"Kernel Module.*?\s(\d+)\.(\d+)", text.partition("\n")[0])
    return (int(match[1]), int(match[2])) if match else None


def driver(gpus: int, cuda: str | None, told: str | None = None) -> Finding | None:
    """Is the GPU's driver new enough for torch's CUDA? None where there is nothing to compare."""
    if not gpus or not cuda:
        return None
    if told is None:
        try:
            told = _DRIVER_VERSION.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return note("driver", "not told", "`nvidia-smi` should show it; if it does not, install the driver anew.")
    major = cuda.partition(".")[0]
    version, least = driver_version(told), _LEAST_DRIVER.get(int(major) if major.isdigit() else 0)
    if version is None or least is None:
        return note("driver", f"not compared with CUDA {cuda}")
    text = f"{version[0]}.{version[1]:02d}, torch for CUDA {cuda}"
    if version < least:
        return bad("driver", text, f"Install driver {least[0]}.{least[1]} or newer, or torch for an older CUDA.")
    return ok("driver", text)


def compiler() -> Finding:
    """Can the CPU kernels be compiled?"""
    for name in _COMPILERS:
        if path := shutil.which(name):
            return ok("compiler", path)
    return note("compiler", "no C++ compiler", "Models on the CPU are slower without compiled kernels: install g++.")


def disk(directory: Path) -> Finding:
    """Is there room for models?"""
    there = directory
    while not there.exists() and there != there.parent:
        there = there.parent
    free = shutil.disk_usage(there).free
    text = f"{free / GIB:.1f} GiB free at {directory}"
    advice = "Models are large: `hostler models` lists those on disk, `hostler rm` deletes one."
    if free < LEAST_DISK_BYTES:
        return bad("disk", text, advice)
    return ok("disk", text) if free >= GOOD_DISK_BYTES else note("disk", text, advice)


def models_directory(directory: Path) -> Finding:
    """Can nobody else exchange the models?"""
    if not directory.exists():
        return ok("models", f"{directory} is made by the first pull")
    info = directory.stat()
    if info.st_mode & 0o022:
        return bad("models", f"others may write to {directory}", f"chmod go-w {directory}")
    if info.st_uid not in (os.getuid(), 0):
        return bad("models", f"{directory} belongs to another user", "Use a models_dir of your own.")
    writable = os.access(directory, os.W_OK)
    return ok("models", str(directory)) if writable else note("models", f"{directory} cannot be written: no pulls")


def port(number: int, *, is_ours: bool) -> Finding:
    """Can a server listen there?"""
    if is_ours:
        return ok("port", f"{number}: hostler serves there")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError as error:
            advice = f"Another program has it: `hostler serve --port {number + 1000}`, or end that one."
            return bad("port", f"{number}: {error.strerror}", advice)
    return ok("port", f"{number} is free")


def ray(address: str | None) -> Finding:
    """Is there a free port for Ray's control plane, or does the cluster to join answer?"""
    if address is None:
        free = [candidate for candidate in range(6400, 6420) if _is_free(candidate)]
        if free:
            return ok("Ray", "ports 6400-9999 for its control plane")
        return bad("Ray", "no free port from 6400 to 6419", "End what listens there.")
    host, _, number = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(number)), timeout=3):
            return ok("Ray", f"{address} answers")
    except (OSError, ValueError) as error:
        return bad("Ray", f"{address}: {error}", "Start the cluster's head first, or leave ray_address out.")


def _is_free(number: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", number))
        except OSError:
            return False
    return True


def hub_and_clock(environ: dict[str, str] | None = None) -> list[Finding]:
    """Can models be fetched, and is the clock right by the Hub's? One request, at most five seconds."""
    values = dict(os.environ) if environ is None else environ
    endpoint = values.get("HF_ENDPOINT", _HUB).rstrip("/")
    if values.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return [note("Hub", "HF_HUB_OFFLINE is set: only models on disk"), note("clock", "not compared")]
    asked_at = time.time()
    try:
        with httpx.Client(timeout=_HUB_TIMEOUT_S, follow_redirects=False) as http:
            answer = http.head(endpoint)
    except httpx.HTTPError as error:
        advice = "Models on disk are served all the same. Behind a proxy set HTTPS_PROXY; for a mirror HF_ENDPOINT."
        return [note("Hub", f"{endpoint}: {type(error).__name__}", advice), note("clock", "not compared")]
    return [ok("Hub", f"{endpoint} answers"), clock(answer.headers.get("date"), asked_at)]


def clock(date: str | None, now_unix_s: float) -> Finding:
    """Is this machine's clock right, by the date of somebody's reply?"""
    parsed = email.utils.parsedate_to_datetime(date) if date else None
    if parsed is None:
        return note("clock", "not compared")
    skew_s = now_unix_s - parsed.timestamp()
    if abs(skew_s) <= MOST_SKEW_S:
        return ok("clock", "right")
    way = "fast" if skew_s > 0 else "slow"
    return bad("clock", f"{abs(skew_s):.0f} s {way}", "Switch time synchronisation on: timedatectl set-ntp true.")
