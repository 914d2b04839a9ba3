#!/usr/bin/env bash
# VAR-d30 from scratch on ImageNet, the released recipe:  bash scripts/train_VAR_d30.sh --data_path /path/to/imagenet
DEPTH=30
source "$(dirname "$(readlink -f "$0")")/recipes.sh"
var_recipe
source "$(dirname "$(readlink -f "$0")")/train_common.sh"
