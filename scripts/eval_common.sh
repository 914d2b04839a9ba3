# The body of the eval_*.sh scripts, which set the numbers and source this with the user's flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ -n "$PYTHON" ] || fail "no Python found: run bash scripts/setup.sh"
"$PYTHON" -c 'import importlib.util as i, sys; sys.exit(not i.find_spec("torch"))' || fail "$PYTHON has no PyTorch: run bash scripts/setup.sh"
case " ${RECIPE[*]} $* " in
    *" --ckpt"* | *" --var_ckpt"* | *" --samples"* | *" --reconstruct"* | *" --compare"* | *" --help"* | *" -h "*) ;;
    *) fail "no weights of this size were released: name --ckpt RUN" ;;
esac
PROTOCOL=(
    --guidance ramp
    --top_k 900
    --num_samples 50
)
# A sweep is in place of the recipe's own value.
case " $* " in *" --sweep_cfg"*) ;; *) PROTOCOL+=(--cfg "$CFG") ;; esac
case " $* " in *" --sweep_top_p"*) ;; *) PROTOCOL+=(--top_p "$TOP_P") ;; esac
if [ -n "${COMPILE:-}" ] && pays_to_compile; then PROTOCOL+=("$COMPILE"); fi
launch evaluate.py "${PROTOCOL[@]}" "${RECIPE[@]}" "$@"
