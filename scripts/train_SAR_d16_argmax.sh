#!/usr/bin/env bash
# SAR-d16 with argmax rollouts: no unconditional forward, the cheapest variant (Table 5).
RECIPE=(
    --exp_name SAR-d16-argmax
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
    --rollout argmax
)
source "$(dirname "$(readlink -f "$0")")/train_common.sh"
