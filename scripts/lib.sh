# Sourced by every script here: the project's root, its Python, and how many processes to start.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT" || exit 1
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

fail() {
    echo "error: $*" >&2
    exit 1
}

# The first comment of the script that was called.
usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$(readlink -f "$0")"
}

# asked_for_help FLAGS… : whether -h or --help is among them.
asked_for_help() {
    local word
    for word in "$@"; do
        case "$word" in -h | --help) return 0 ;; esac
    done
    return 1
}

# $PYTHON if set, else the project's virtual environment, else whatever python3 is active (conda, say).
if [ -z "${PYTHON:-}" ]; then
    if [ -x "$ROOT/.venv/bin/python" ]; then PYTHON="$ROOT/.venv/bin/python"; else PYTHON="$(command -v python3 || true)"; fi
fi

# Processes on this node: $NPROC if set, else one a GPU, else one.
count_gpus() {
    local device count=0
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        for device in ${CUDA_VISIBLE_DEVICES//,/ }; do # up to the first that is none: -1 and NoDevFiles say "none"
            [[ $device =~ ^([0-9]+|GPU-.*|MIG-.*)$ ]] || break
            count=$((count + 1))
        done
        echo "$count"
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

# pays_to_compile : there is a GPU, and the C compiler that torch.compile needs.
pays_to_compile() {
    [ "$(count_gpus)" -gt 0 ] && command -v "${CC:-cc}" gcc clang >/dev/null
}

# whole NAME VALUE LEAST MOST : an environment variable must be such a number.
whole() {
    case "$2" in '' | *[!0-9]* | ??????*) fail "$1 must be a whole number from $3 to $4, got '$2'" ;; esac
    [ "$2" -ge "$3" ] && [ "$2" -le "$4" ] || fail "$1 must be a whole number from $3 to $4, got '$2'"
}

port_is_free() {
    ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# launch ENTRY FLAGS… : one process as plain Python, several under torchrun. NNODES, NODE_RANK, MASTER_ADDR,
# MASTER_PORT and NPROC come from the environment.
launch() {
    local gpus nproc nnodes=${NNODES:-1} rendezvous
    gpus=$(count_gpus)
    if asked_for_help "$@"; then # of the entry, once
        usage
        exec "$PYTHON" "$@"
    fi
    nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
    whole NPROC "$nproc" 1 4096
    whole NNODES "$nnodes" 1 65536
    local cores
    cores=$(nproc 2>/dev/null || sysctl -n hw.ncpu)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}
    if [ -z "${PYTORCH_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-}" ]; then # drawn schedules would fragment GPU memory
        export PYTORCH_ALLOC_CONF=expandable_segments:True
    fi
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # threads that spin in wait would take other ranks' cores
    if [ "$nnodes" = 1 ] && [ "$nproc" = 1 ]; then
        exec "$PYTHON" "$@"
    fi
    # torchrun passes these on to the ranks, who save; by itself it knows all but the last.
    export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
    # Seconds that torchrun gives the ranks to save after a SIGTERM, before it kills them.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-180}
    rendezvous=(--standalone)
    if [ "$nnodes" != 1 ]; then
        [ -n "${MASTER_ADDR:-}" ] || fail "NNODES is $nnodes: set MASTER_ADDR to the first node's address, and NODE_RANK here"
        whole NODE_RANK "${NODE_RANK:-0}" 0 $((nnodes - 1))
        whole MASTER_PORT "${MASTER_PORT:-29500}" 1 65535
        if [ "${NODE_RANK:-0}" = 0 ] && ! port_is_free "${MASTER_PORT:-29500}"; then
            fail "port ${MASTER_PORT:-29500} is in use on this node: set MASTER_PORT to a free one, on every node"
        fi
        rendezvous=(--node_rank "${NODE_RANK:-0}" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
    fi
    exec "$PYTHON" -m torch.distributed.run --nnodes "$nnodes" --nproc_per_node "$nproc" "${rendezvous[@]}" "$@"
}
