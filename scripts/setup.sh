#!/usr/bin/env bash
# Make .venv with everything in requirements.txt and tests/requirements.txt. Does nothing when that is done already.
set -euo pipefail
case "${1:-}" in
    '') ;;
    -h | --help) sed -n '2,/^[^#]/s/^# //p' "$0"; exit 0 ;;
    *) echo "error: unknown argument $1: setup.sh takes none" >&2; exit 2 ;;
esac
cd "$(dirname "$(readlink -f "$0")")/.."

if [ -n "${PYTHON:-}" ]; then exit 0; fi # the caller brings an environment of their own
base=$(command -v python3 || command -v python) || { echo "error: Python 3.11 or newer is missing" >&2; exit 1; }
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: Python 3.11 or newer is needed, $base is $("$base" -V)" >&2; exit 1; }

want=$(cat requirements.txt tests/requirements.txt | cksum)
if [ -x .venv/bin/python ] && [ "$(cat .venv/current 2>/dev/null)" = "$want" ]; then exit 0; fi

echo "setting up .venv (PyTorch is a few GB) …"
[ -x .venv/bin/python ] || "$base" -m venv .venv
.venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null # uv's have none
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
echo "$want" > .venv/current
