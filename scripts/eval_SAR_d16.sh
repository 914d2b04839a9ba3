#!/usr/bin/env bash
# FID, sFID, IS, precision and recall of SAR-d16: 50 images of each of 1,000 classes.
RECIPE=(
    --ckpt pretrained/SARd16-epo179.pth
    --cfg 2.2
    --out_dir out/eval_SAR_d16
)
source "$(dirname "$(readlink -f "$0")")/eval_common.sh"
