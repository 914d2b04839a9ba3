#!/usr/bin/env bash
# FID, sFID, IS, precision and recall of FlexVAR-d24: 50 images of each of 1,000 classes.
RECIPE=(
    --ckpt pretrained/FlexVARd24-epo349.pth
    --cfg 3.3
    --out_dir out/eval_FlexVAR_d24
)
source "$(dirname "$(readlink -f "$0")")/eval_common.sh"
