#!/usr/bin/env bash
# SAR-d16 from FlexVAR-d16 on ImageNet:  bash scripts/train_SAR_d16.sh --data_path /path/to/imagenet
DEPTH=16
source "$(dirname "$(readlink -f "$0")")/recipes.sh"
sar_recipe
RECIPE+=("${GUIDED[@]}")
source "$(dirname "$(readlink -f "$0")")/train_common.sh"
