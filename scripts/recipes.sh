# Sourced by train_SAR_d*.sh and eval_*_d*.sh, which set DEPTH (and FAMILY): the recipes, and what differs by depth.
FILE_FlexVAR='' FILE_SAR='' ALNG=1e-3 CFG=2.5 # of a depth that was not released
case "$DEPTH" in
    16) FILE_FlexVAR=FlexVARd16-epo179.pth FILE_SAR=SARd16-epo179.pth CFG=2.2 ;;
    20) FILE_FlexVAR=FlexVARd20-epo249.pth FILE_SAR=SARd20-epo249.pth CFG=2.6 ;;
    24) FILE_FlexVAR=FlexVARd24-epo349.pth FILE_SAR=SARd24-epo349.pth CFG=3.3 ALNG=1e-4 ;;
esac

sar_recipe() { # the paper's, from the released FlexVAR of this depth
    RECIPE=(
        --exp_name "SAR-d$DEPTH"
        --training_mode csfl
        ${FILE_FlexVAR:+--init_ckpt "pretrained/$FILE_FlexVAR"}
        --vae_ckpt pretrained/FlexVAE.pth
        --depth "$DEPTH"
        --alng "$ALNG"
        --ep 10
        --bs 768
        --lr 1e-4
        --tclip 2.0
        --csf_weight 0.01
        --ssr all
    )
    GUIDED=(--rollout cfg --sf_cfg_scale 2.5 --sf_top_k 900 --sf_top_p 0.95)
}

eval_recipe() { # of FAMILY's released file of this depth
    local file="FILE_$FAMILY"
    RECIPE=(${!file:+--ckpt "pretrained/${!file}"} --cfg "$CFG" --out_dir "out/eval_${FAMILY}_d$DEPTH")
}
