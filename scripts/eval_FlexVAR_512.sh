#!/usr/bin/env bash
# FlexVAR-d24, trained at 256×256, judged at 512×512 (zero-shot). A GPU needs 4.1 GB for the weights and 0.7 GB an image of --batch.
DEPTH=24 FAMILY=FlexVAR
source "$(dirname "$(readlink -f "$0")")/recipes.sh"
eval_recipe
RECIPE+=(--pn 1_2_3_4_5_6_8_10_13_16_23_32 --reference imagenet512 --batch 16 --out_dir out/eval_FlexVAR_512)
source "$(dirname "$(readlink -f "$0")")/eval_common.sh"
