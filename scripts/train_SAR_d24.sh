#!/usr/bin/env bash
# SAR-d24 from FlexVAR-d24 on ImageNet:  bash scripts/train_SAR_d24.sh --data_path /path/to/imagenet
DEPTH=24
source "$(dirname "$(readlink -f "$0")")/recipes.sh"
sar_recipe
RECIPE+=("${GUIDED[@]}")
source "$(dirname "$(readlink -f "$0")")/train_common.sh"
