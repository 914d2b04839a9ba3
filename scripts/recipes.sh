# Sourced by train_*_d*.sh and eval_*_d*.sh, which set DEPTH (and FAMILY): the recipes, and what differs by depth.
FILE_FlexVAR='' FILE_SAR='' FILE_VAR='' ALNG=1e-3 CFG=2.5 TOP_P=0.95 # of a depth that was not released
VAR_EPOCHS=350 VAR_BS=768 VAR_LR=2.4e-4 VAR_WPE=0.01 VAR_TWDE=''
FLOW_STEPS=25 FLOW_INTERVAL=0.9 FLOW_DEPTH=2 FLOW_WIDTH=1024
TOKENIZER=FlexVAE.pth MODEL=() COMPILE=--compile # on a GPU; a --nocompile that follows takes it back
case "$DEPTH" in
    16)
        FILE_FlexVAR=FlexVARd16-epo179.pth FILE_SAR=SARd16-epo179.pth FILE_VAR=var_d16.pth CFG=2.2
        VAR_EPOCHS=200 VAR_LR=3e-4 VAR_WPE=0.1
        ;;
    20)
        FILE_FlexVAR=FlexVARd20-epo249.pth FILE_SAR=SARd20-epo249.pth FILE_VAR=var_d20.pth CFG=2.6
        VAR_EPOCHS=250 VAR_LR=3e-4 VAR_WPE=0.1
        ;;
    24)
        FILE_FlexVAR=FlexVARd24-epo349.pth FILE_SAR=SARd24-epo349.pth FILE_VAR=var_d24.pth CFG=3.3 ALNG=1e-4
        ;;
    30) FILE_VAR=var_d30.pth ALNG=1e-5 VAR_BS=1024 VAR_LR=3.2e-4 VAR_TWDE=0.08 ;;
    36) FILE_VAR=var_d36.pth ;; # 512 × 512
esac

sar_recipe() { # the paper's, from the released FlexVAR of this depth, or from another family's model
    local name=SAR file="$FILE_FlexVAR"
    case "${FAMILY:-}" in VAR) name=SAR-VAR file="$FILE_VAR" && var_model ;; esac
    RECIPE=(
        --exp_name "$name-d$DEPTH"
        --training_mode csfl
        ${file:+--init_ckpt "pretrained/$file"}
        --vae_ckpt "pretrained/$TOKENIZER"
        --depth "$DEPTH"
        --alng "$ALNG"
        --ep 10
        --bs 768
        --lr 1e-4
        --tclip 2.0
        --csf_weight 0.01
        --ssr all
        "${MODEL[@]}"
    )
    GUIDED=(--rollout cfg --sf_cfg_scale 2.5 --sf_top_k 900 --sf_top_p 0.95)
}

flowar_sizes() { # of SIZE: S, B, L or H; B is our reading, from S with twice the layers
    case "$SIZE" in
        S) DEPTH=6 WIDTH=768 CFG=4.3 ;;
        B) DEPTH=12 WIDTH=768 CFG=4.3 ;;
        L) DEPTH=8 WIDTH=1024 CFG=2.4 FLOW_DEPTH=12 CROSS=true ;;
        H) DEPTH=15 WIDTH=1536 CFG=2.4 FLOW_DEPTH=12 FLOW_WIDTH=1536 CROSS=true FLOW_STEPS=50 FLOW_INTERVAL=0.7 ;;
    esac
    TOKENIZER=kl16.ckpt
    MODEL=(
        --model flowar
        --schedule fixed
        --pn 1_2_4_8_16
        --depth "$DEPTH"
        --width "$WIDTH"
        --flow_depth "$FLOW_DEPTH"
        --flow_width "$FLOW_WIDTH"
        --flow_cross "${CROSS:-false}"
    )
    AUGMENT=(--augment flowar) COMPILE=
    [ "$SIZE" != H ] || MODEL+=(--heads 16)
}

flowar_recipe() { # FlowAR's own: its warm-up is a quarter of the run, whatever --ep says
    flowar_sizes
    RECIPE=(
        --exp_name "FlowAR-$SIZE"
        --training_mode teacher_forcing
        --vae_ckpt "pretrained/$TOKENIZER"
        --ep 400
        --bs 2048
        --lr 4e-4
        --lr_decay cosine
        --wp 0.25
        --wpe 0.025
        --twd 0.02
        --tclip 3.0
        --ema 0.9999
        "${MODEL[@]}"
    )
}

var_model() { # what any run of a VAR says
    TOKENIZER=vae_ch160v4096z32.pth
    MODEL=(--model var --schedule fixed) AUGMENT=(--augment var)
}

var_recipe() { # VAR's own, from scratch
    var_model
    RECIPE=(
        --exp_name "VAR-d$DEPTH"
        --training_mode teacher_forcing
        --vae_ckpt "pretrained/$TOKENIZER"
        --depth "$DEPTH"
        --alng "$ALNG"
        --ep "$VAR_EPOCHS"
        --bs "$VAR_BS"
        --lr "$VAR_LR"
        --wp 0.02
        --wpe "$VAR_WPE"
        --twd 0.05
        ${VAR_TWDE:+--twde "$VAR_TWDE"}
        --tclip 2.0
        "${MODEL[@]}"
    )
}

eval_recipe() { # of FAMILY's released file of this depth
    local file="FILE_$FAMILY"
    case "$FAMILY" in
        VAR) var_model && CFG=1.5 TOP_P=0.96 ;;
        FlowAR)
            flowar_sizes
            local name="FlowAR-$SIZE.pth"
            [ "$SIZE" != B ] || name='' # none was released
            RECIPE=(
                ${name:+--ckpt "pretrained/$name"}
                --flow_steps "$FLOW_STEPS"
                --guidance_interval "$FLOW_INTERVAL"
                --out_dir "out/eval_FlowAR_$SIZE"
            )
            return
            ;;
    esac
    RECIPE=(${!file:+--ckpt "pretrained/${!file}"} --out_dir "out/eval_${FAMILY}_d$DEPTH")
}
