#!/usr/bin/env bash
# VAR-d20 from scratch on ImageNet, the released recipe:  bash scripts/train_VAR_d20.sh --data_path /path/to/imagenet
DEPTH=20
source "$(dirname "$(readlink -f "$0")")/recipes.sh"
var_recipe
source "$(dirname "$(readlink -f "$0")")/train_common.sh"
