#!/usr/bin/env bash
# Lint, format, types and tests; sets itself up on a bare machine. Arguments go to pytest: bash scripts/test.sh -k sampling
# bash scripts/test.sh --faults: all injected faults instead, a quarter of an hour (see docs/reliability.md).
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/s/^# //p' "$0"; exit 0 ;; esac
bash "$(dirname "$(readlink -f "$0")")/setup.sh"
source "$(dirname "$(readlink -f "$0")")/lib.sh"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy .
# Two tests at a time, each on one thread: threads that wait for each other's cores are many times slower.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
if [ "${1:-}" = --faults ]; then
    exec "$PYTHON" -m pytest -n 2 --dist worksteal -m "faults or not faults" tests/faults -rA --durations=0 "${@:2}"
fi
exec "$PYTHON" -m pytest -n 2 --dist worksteal "$@"
