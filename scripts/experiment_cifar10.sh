#!/usr/bin/env bash
# The study on CIFAR-10:  bash scripts/experiment_cifar10.sh --data_path cifar10 [--size cpu|gpu] [--part main|all] [--status]
set -euo pipefail
source "$(dirname "$0")/lib.sh"
[ -n "$PYTHON" ] || fail "no Python found: run bash scripts/setup.sh"
exec "$PYTHON" -m experiments.study_cifar10 "$@"
