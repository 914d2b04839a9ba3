#!/usr/bin/env bash
# FID, sFID, IS, precision and recall of VAR-d24: 50 images of each of 1,000 classes.
DEPTH=24 FAMILY=VAR
source "$(dirname "$(readlink -f "$0")")/recipes.sh"
eval_recipe
source "$(dirname "$(readlink -f "$0")")/eval_common.sh"
