#!/usr/bin/env bash
# Fetch and check ahead what evaluations download: Inception's weights (95 MB) and ImageNet's reference batch (2 GB).
set -euo pipefail
bash "$(dirname "$(readlink -f "$0")")/setup.sh"
source "$(dirname "$(readlink -f "$0")")/lib.sh"
exec "$PYTHON" -m utils.evaluations.c2i.setup "$@"
