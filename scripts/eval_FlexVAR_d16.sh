#!/usr/bin/env bash
# FID, sFID, IS, precision and recall of FlexVAR-d16: 50 images of each of 1,000 classes.
RECIPE=(
    --ckpt pretrained/FlexVARd16-epo179.pth
    --cfg 2.2
    --out_dir out/eval_FlexVAR_d16
)
source "$(dirname "$(readlink -f "$0")")/eval_common.sh"
