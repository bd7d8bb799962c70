#!/usr/bin/env bash
# Brings .venv up to date with pyproject.toml; called by `make`, safe to run at any time.
#
#   deploy/setup.sh run     what `hostler serve` needs
#   deploy/setup.sh dev     the above and what tests and checks need
#
# A stamp of what was installed makes a second run take milliseconds. On a Linux machine without an NVIDIA GPU
# torch's CPU build is pinned before anything else, so that no CUDA package can come in.
#
#   PYTHON=/path/to/python3.x       the interpreter to use (3.11 or newer)
#   HOSTLER_TORCH_CPU_INDEX=URL     where torch's CPU build is looked for when your own pip settings do not find it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly TORCH_CPU="torch==2.13.0+cpu"
readonly CPU_INDEX="${HOSTLER_TORCH_CPU_INDEX-https://download.pytorch.org/whl/cpu}"
readonly VENV=.venv
readonly LOG=$VENV/setup.log
readonly MODE="${1:-run}"

case "$MODE" in
run) extra=all ;;
dev) extra=dev ;;
*)
  echo "usage: deploy/setup.sh [run|dev]" >&2
  exit 2
  ;;
esac

say() { printf '%s\n' "$*"; }

die() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

stamp_text() { # of what is asked for: project, this script, interpreter, place (scripts in .venv hold absolute paths)
  cksum <pyproject.toml
  cksum <deploy/setup.sh
  "$VENV/bin/python" -c 'import sys; print(sys.version)'
  pwd
}

is_up_to_date() { # MODE
  [ -f "$VENV/stamp-$1" ] && [ -x "$VENV/bin/python" ] && [ "$(stamp_text 2>/dev/null)" = "$(cat "$VENV/stamp-$1")" ]
}

can_run_hostler() { # INTERPRETER
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    can_run_hostler "$PYTHON" || die "PYTHON=$PYTHON is not Python 3.11 to 3.14 with the venv module."
    printf '%s' "$PYTHON"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11 python3.14 python; do
    if can_run_hostler "$candidate"; then
      printf '%s' "$candidate"
      return
    fi
  done
  die "no Python 3.11 to 3.14 with the venv module was found. Install one (Debian, Ubuntu: apt install python3-venv) or set PYTHON."
}

has_nvidia_gpu() {
  [ -n "$(ls /proc/driver/nvidia/gpus 2>/dev/null)" ] || [ -e /dev/nvidia0 ] || nvidia-smi -L 2>/dev/null | grep -q '^GPU '
}

running=""
trap '[ -z "$running" ] || kill "$running" 2>/dev/null || true' EXIT
trap 'exit 130' INT TERM

attempt() { # LABEL COMMAND…: runs it quietly, shows the seconds, returns its status
  local label=$1 began=$SECONDS status=0 spent
  shift
  printf '\n## %s: %s\n' "$label" "$*" >>"$LOG"
  "$@" >>"$LOG" 2>&1 </dev/null &
  running=$!
  if [ -t 1 ]; then
    while kill -0 "$running" 2>/dev/null; do
      printf '\r  · %-44s %4d s' "$label" $((SECONDS - began))
      sleep 0.3
    done
    printf '\r'
  fi
  wait "$running" || status=$?
  running=""
  spent=$((SECONDS - began))
  if [ "$status" = 0 ]; then printf '  ✓ %-44s %4d s\n' "$label" "$spent"; else printf '  ✗ %-44s %4d s\n' "$label" "$spent"; fi
  return "$status"
}

step() {
  attempt "$@" && return
  printf '\nLast lines of %s:\n' "$LOG" >&2
  tail -n 25 "$LOG" | sed 's/^/    /' >&2
  die "'$1' failed; the whole log is in $LOG."
}

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check install --progress-bar off "$@"; }

installed_torch() {
  "$VENV/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' 2>/dev/null || true
}

# The exact local version can only ever be the CPU build: when no index has it pip stops before any download.
pin_cpu_torch() {
  case "$(installed_torch)" in *+cpu) return ;; esac
  if ! attempt "torch, CPU build (your pip settings)" pip --retries 1 "$TORCH_CPU"; then
    attempt "torch, CPU build (${CPU_INDEX#*://})" \
      pip --retries 1 --timeout 20 --extra-index-url "$CPU_INDEX" "$TORCH_CPU" || true
  fi
  case "$(installed_torch)" in
  *+cpu) ;;
  *)
    tail -n 8 "$LOG" | sed 's/^/    /' >&2
    die "this machine has no NVIDIA GPU, and $TORCH_CPU was not found in your pip settings nor at $CPU_INDEX.
The default build would download gigabytes of CUDA packages that cannot be used here, so nothing was installed.
Give pip a source of the CPU build (--find-links or an index in pip.conf, or HOSTLER_TORCH_CPU_INDEX=URL) and run again."
    ;;
  esac
}

no_cuda_packages() {
  "$VENV/bin/python" - <<'PY'
import sys
from importlib.metadata import distributions

names = sorted({d.metadata["Name"].lower() for d in distributions()})
cuda = [n for n in names if n.startswith(("nvidia-", "cuda-")) and n != "nvidia-ml-py"]
print("CUDA packages:", ", ".join(cuda) or "none")
sys.exit(bool(cuda))
PY
}

is_up_to_date "$MODE" && exit 0
if [ "$MODE" = run ] && is_up_to_date dev; then exit 0; fi

python=$(find_python)
if [ -f "$VENV/place" ] && [ "$(cat "$VENV/place")" != "$(pwd)" ]; then
  say "  · $VENV was made for another directory; making it anew"
  rm -rf "$VENV"
fi
if ! "$VENV/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
  rm -rf "$VENV"
  mkdir -p "$VENV"
  : >"$LOG"
  step "virtual environment, $("$python" -V 2>&1)" "$python" -m venv "$VENV"
else
  : >"$LOG"
fi
pwd >"$VENV/place"

constraints=$VENV/constraints.txt
: >"$constraints"
if [ "$(uname -s)" = Linux ] && ! has_nvidia_gpu; then
  say "  · no NVIDIA GPU here: torch's CPU build, no CUDA packages"
  pin_cpu_torch
  installed_torch >"$constraints"
fi
step "hostler[$extra] and what it needs" pip --constraint "$constraints" --editable ".[$extra]"
if [ -s "$constraints" ]; then step "no CUDA packages came in" no_cuda_packages; fi
# Compiled once for each processor; without a compiler it says so, and serving goes on without them.
step "kernels for this processor" "$VENV/bin/python" -m workers.text.native.build
if grep -q '^no CPU kernels' "$LOG"; then say "  · $(grep '^no CPU kernels' "$LOG" | tail -n 1)"; fi
stamp_text >"$VENV/stamp-$MODE"
say "  ✓ set up in $SECONDS s"
