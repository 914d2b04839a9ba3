#!/usr/bin/env bash
# The study on CIFAR-10:  bash scripts/experiment_cifar10.sh --data_path cifar10 [--size cpu|gpu] [--part main|all] [--status]
set -euo pipefail
bash "$(dirname "$(readlink -f "$0")")/setup.sh"
source "$(dirname "$(readlink -f "$0")")/lib.sh"
exec "$PYTHON" -m experiments.study_cifar10 "$@"
