#!/usr/bin/env bash
# Lint, format and tests; sets itself up on a bare machine. Arguments go to pytest: bash scripts/test.sh -k sampling
set -euo pipefail
bash "$(dirname "$0")/setup.sh"
source "$(dirname "$0")/lib.sh"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest "$@"
