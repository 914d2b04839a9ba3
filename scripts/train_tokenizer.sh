#!/usr/bin/env bash
# FlexVAR's tokenizer on 256×256 images (VQ-16, 8912 × 32):  bash scripts/train_tokenizer.sh --data_path imagenet
# From the released one:  … --init_ckpt pretrained/FlexVAE.pth --lr 2e-5 --disc_start 2000
ENTRY=train_tokenizer.py
RECIPE=(
    --exp_name tokenizer
    --image_size 256
    --codebook_size 8912
    --codebook_dim 32
    --sides_per_step 2
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
