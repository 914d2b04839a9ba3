#!/usr/bin/env bash
# FID, sFID, IS, precision and recall of FlowAR-B: 50 images of each of 1,000 classes.  B was not released: name --ckpt RUN
SIZE=B FAMILY=FlowAR DEPTH=0
source "$(dirname "$(readlink -f "$0")")/recipes.sh"
eval_recipe
source "$(dirname "$(readlink -f "$0")")/eval_common.sh"
