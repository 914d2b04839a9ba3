# The body of the eval_*.sh scripts, which set the numbers and source this with the user's flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ -n "$PYTHON" ] || fail "no Python found: run bash scripts/setup.sh"
"$PYTHON" -c 'import torch' 2>/dev/null || fail "$PYTHON has no PyTorch: run bash scripts/setup.sh"
PROTOCOL=(
    --vae_ckpt pretrained/FlexVAE.pth
    --guidance ramp
    --top_k 900
    --top_p 0.95
    --num_samples 50
)
case " $* " in # a sweep is in place of the recipe's guidance
    *" --sweep_cfg"*) for i in "${!RECIPE[@]}"; do
        [ "${RECIPE[$i]}" != --cfg ] || RECIPE=("${RECIPE[@]:0:$i}" "${RECIPE[@]:$((i + 2))}")
    done ;;
esac
launch evaluate.py "${PROTOCOL[@]}" "${RECIPE[@]}" "$@"
