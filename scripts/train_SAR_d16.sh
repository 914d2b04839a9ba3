#!/usr/bin/env bash
# SAR-d16 from FlexVAR-d16 on ImageNet:  bash scripts/train_SAR_d16.sh --data_path /path/to/imagenet
RECIPE=(
    --exp_name SAR-d16
    --training_mode csfl
    --init_ckpt pretrained/FlexVARd16-epo179.pth
    --vae_ckpt pretrained/FlexVAE.pth
    --depth 16
    --alng 1e-3
    --ep 10
    --bs 768
    --lr 1e-4
    --tclip 2.0
    --csf_weight 0.01
    --ssr all
    --rollout cfg
    --sf_cfg_scale 2.5
    --sf_top_k 900
    --sf_top_p 0.95
)
source "$(dirname "$(readlink -f "$0")")/train_common.sh"
