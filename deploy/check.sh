#!/usr/bin/env bash
# Everything that can be checked without starting the server; called by `make check`.
# One line per check with its seconds; a check's output is shown only when it fails; all run even if one fails.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"

output=$(mktemp)
generated=$(mktemp -d)
trap 'rm -rf "$output" "$generated"' EXIT
failed=0
if [ -t 1 ]; then green=$'\e[32m' red=$'\e[31m' plain=$'\e[0m'; else green='' red='' plain=''; fi

check() { # LABEL COMMAND…
  local label=$1 began=$SECONDS
  shift
  if "$@" >"$output" 2>&1 </dev/null; then
    printf '%s  ✓ %-34s %3d s%s\n' "$green" "$label" $((SECONDS - began)) "$plain"
  else
    printf '%s  ✗ %-34s%s\n' "$red" "$label" "$plain"
    sed 's/^/      /' "$output"
    failed=$((failed + 1))
  fi
}

proto_drift() {
  deploy/proto.sh "$generated" || return
  local file same=0
  while read -r file; do
    diff -u "proto/$file" "$generated/$file" || same=1
  done < <(cd "$generated" && find . -type f)
  [ "$same" = 0 ] || echo "Generated code differs from the .proto files; run 'make proto' and commit the result."
  return "$same"
}

check "format (ruff)" ruff format --check --quiet .
check "lint (ruff)" ruff check --quiet .
check "types (mypy strict)" mypy --no-error-summary
check "types of benchmark and simulator" mypy --no-error-summary -p tests.bench -p tests.sim
check "import fences (import-linter)" lint-imports --no-logo
check "proto lint (buf)" buf lint
check "generated code is current" proto_drift
check "docs, tree, planted violations" pytest -q -p no:cacheprovider -m "not journey" tests/checks

if [ "$failed" = 0 ]; then
  printf '%sAll checks passed.%s\n' "$green" "$plain"
else
  printf '%s%d of the checks failed.%s\n' "$red" "$failed" "$plain"
  exit 1
fi
