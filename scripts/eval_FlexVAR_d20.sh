#!/usr/bin/env bash
# FID, sFID, IS, precision and recall of FlexVAR-d20: 50 images of each of 1,000 classes.
RECIPE=(
    --ckpt pretrained/FlexVARd20-epo249.pth
    --cfg 2.6
    --out_dir out/eval_FlexVAR_d20
)
source "$(dirname "$(readlink -f "$0")")/eval_common.sh"
