# The body of the train_*.sh scripts, which set the numbers (and ENTRY, if not train.py) and source this with the user's
# flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ -n "$PYTHON" ] || fail "no Python found: run bash scripts/setup.sh"
"$PYTHON" -c 'import importlib.util as i, sys; sys.exit(not i.find_spec("torch"))' || fail "$PYTHON has no PyTorch: run bash scripts/setup.sh"
ENTRY=${ENTRY:-train.py}
# How images are cropped stands in a code cache's manifest, where there is one.
case " $* " in *" --code_cache"*) ;; *) RECIPE+=(${AUGMENT[@]+"${AUGMENT[@]}"}) ;; esac
if [ -n "${COMPILE:-}" ] && pays_to_compile; then RECIPE+=("$COMPILE"); fi
asked_for_help "$@" || "$PYTHON" "$ENTRY" "${RECIPE[@]}" "$@" --check # one clear line before torchrun starts, if something is missing
case " $* " in *" --check "*) exit 0 ;; esac
launch "$ENTRY" "${RECIPE[@]}" "$@"
