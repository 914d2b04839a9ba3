# Sourced by every script here: the project's root, its Python, and how many processes to start.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT" || exit 1
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

fail() {
    echo "error: $*" >&2
    exit 1
}

# $PYTHON if set, else the project's virtual environment, else whatever python3 is active (conda, say).
if [ -z "${PYTHON:-}" ]; then
    if [ -x "$ROOT/.venv/bin/python" ]; then PYTHON="$ROOT/.venv/bin/python"; else PYTHON="$(command -v python3 || true)"; fi
fi

# Processes on this node: $NPROC if set, else one a GPU, else one.
count_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[0-9A-Za-z]' || true # none is no failure
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

# launch ENTRY FLAGS… : one process as plain Python, several under torchrun. NNODES, NODE_RANK, MASTER_ADDR,
# MASTER_PORT and NPROC come from the environment.
launch() {
    local gpus nproc nnodes=${NNODES:-1} rendezvous
    gpus=$(count_gpus)
    nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
    local cores
    cores=$(nproc 2>/dev/null || sysctl -n hw.ncpu)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}
    if [ "$nnodes" = 1 ] && [ "$nproc" = 1 ]; then
        exec "$PYTHON" "$@"
    fi
    # Seconds that torchrun gives the ranks to save after a SIGTERM, before it kills them.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-180}
    rendezvous=(--standalone)
    if [ "$nnodes" != 1 ]; then
        [ -n "${MASTER_ADDR:-}" ] || fail "NNODES is $nnodes: set MASTER_ADDR to the first node's address, and NODE_RANK here"
        rendezvous=(--node_rank "${NODE_RANK:-0}" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
    fi
    exec "$PYTHON" -m torch.distributed.run --nnodes "$nnodes" --nproc_per_node "$nproc" "${rendezvous[@]}" "$@"
}
