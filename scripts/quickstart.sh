#!/usr/bin/env bash
# Digits, from nothing to SAR samples: sets itself up, trains, samples, and writes out/quickstart/report.md.
set -euo pipefail
bash "$(dirname "$(readlink -f "$0")")/setup.sh"
source "$(dirname "$(readlink -f "$0")")/lib.sh"
exec "$PYTHON" -m experiments.quickstart "$@"
