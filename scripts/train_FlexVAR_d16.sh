#!/usr/bin/env bash
# FlexVAR-d16 from scratch on ImageNet, the released recipe:  bash scripts/train_FlexVAR_d16.sh --data_path …
RECIPE=(
    --exp_name FlexVAR-d16
    --training_mode teacher_forcing
    --vae_ckpt pretrained/FlexVAE.pth
    --depth 16
    --alng 1e-3
    --ep 180
    --bs 768
    --lr 3e-4
    --wp 0.02
    --wpe 0.1
    --tclip 2.0
)
COMPILE=--compile # on a GPU
source "$(dirname "$(readlink -f "$0")")/train_common.sh"
