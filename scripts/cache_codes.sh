#!/usr/bin/env bash
# Encode a data set once, for training without images:  bash scripts/cache_codes.sh --data_path imagenet --out codes
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/lib.sh"
[ -n "$PYTHON" ] || fail "no Python found: run bash scripts/setup.sh"
launch -m utils.data.code_cache "$@"
