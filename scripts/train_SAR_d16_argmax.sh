#!/usr/bin/env bash
# SAR-d16 with argmax rollouts: no unconditional forward, the cheapest variant (Table 5).
DEPTH=16
source "$(dirname "$(readlink -f "$0")")/recipes.sh"
sar_recipe
RECIPE+=(--exp_name SAR-d16-argmax --rollout argmax)
source "$(dirname "$(readlink -f "$0")")/train_common.sh"
