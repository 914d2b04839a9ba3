#!/usr/bin/env bash
# FlowAR-B (our reading) from scratch on ImageNet:  bash scripts/train_FlowAR_B.sh --data_path imagenet --ep 50
SIZE=B DEPTH=0
source "$(dirname "$(readlink -f "$0")")/recipes.sh"
flowar_recipe
source "$(dirname "$(readlink -f "$0")")/train_common.sh"
