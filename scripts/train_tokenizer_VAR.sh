#!/usr/bin/env bash
# VAR's residual tokenizer on 256×256 images (4096 × 32):  bash scripts/train_tokenizer_VAR.sh --data_path imagenet
# From the released one:  … --init_ckpt pretrained/vae_ch160v4096z32.pth --lr 2e-5 --disc_start 2000
ENTRY=train_tokenizer.py
RECIPE=(
    --exp_name tokenizer_VAR
    --quantiser residual
    --image_size 256
    --base_width 160
    --codebook_size 4096
    --codebook_dim 32
    --ep 40
    --bs 128
    --lr 1e-4
    --tclip 1.0
    --commitment 0.25
    --perceptual lpips
    --disc_weight 0.5
    --disc_start 20000
    --ema 0.999
)
source "$(dirname "$(readlink -f "$0")")/train_common.sh"
