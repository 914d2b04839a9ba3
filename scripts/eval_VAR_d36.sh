#!/usr/bin/env bash
# FID, sFID, IS, precision and recall of VAR-d36 at 512×512. A GPU needs 9.4 GB for the weights and 1.5 GB an image of --batch.
DEPTH=36 FAMILY=VAR
source "$(dirname "$(readlink -f "$0")")/recipes.sh"
eval_recipe
RECIPE+=(--reference imagenet512 --batch 16)
source "$(dirname "$(readlink -f "$0")")/eval_common.sh"
