#!/usr/bin/env bash
# SAR-d20 from FlexVAR-d20 on ImageNet:  bash scripts/train_SAR_d20.sh --data_path /path/to/imagenet
DEPTH=20
source "$(dirname "$(readlink -f "$0")")/recipes.sh"
sar_recipe
RECIPE+=("${GUIDED[@]}")
source "$(dirname "$(readlink -f "$0")")/train_common.sh"
