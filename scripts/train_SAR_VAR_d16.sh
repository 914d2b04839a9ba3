#!/usr/bin/env bash
# SAR on VAR-d16, from its released weights:  bash scripts/train_SAR_VAR_d16.sh --data_path /path/to/imagenet
DEPTH=16 FAMILY=VAR
source "$(dirname "$(readlink -f "$0")")/recipes.sh"
sar_recipe
RECIPE+=("${GUIDED[@]}")
source "$(dirname "$(readlink -f "$0")")/train_common.sh"
