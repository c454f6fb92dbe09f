#!/usr/bin/env bash
# One node's part of a run, the same line on a laptop and on a cluster:
#
#     launch/run_train.sh trainer.epochs=3
#     NPROC=8 NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 CONFIG=mine.yaml launch/run_train.sh
#
# Arguments go to the command. All of these have defaults:
#
#     COMMAND          what runs: train, evaluate, recommend, predict, nightly
#     CONFIG           YAML file or name of a bundled one (sample)
#     NPROC            processes on this node (its GPUs, 2 where there are none)
#     NNODES           nodes, or MIN:MAX of an elastic run (1)
#     NODE_RANK        this node, from 0; node 0 is the one at MASTER_ADDR (0)
#     MASTER_ADDR      an address of node 0 that all nodes reach (localhost)
#     MASTER_PORT      a port that is free there (29500; one node picks a free one by itself)
#     LOCAL_ADDR       this node's address for the others, where its name is not one
#     JOB_ID           tells apart runs that use one address and port (deepfm)
#     MAX_RESTARTS     how often the ranks start again after one is lost (0)
#     SAVE_SECONDS     after SIGTERM, how long ranks may write a checkpoint (300)
#     LOG_RANK         local ranks whose output alone is shown, such as 0,3
#     OMP_NUM_THREADS  threads of a process (1)
#     PYTHON           interpreter that checks the settings (the one next to torchrun)
set -euo pipefail

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
# Each restart gets its own store: gloo would meet the dead ranks' addresses in a shared one.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
nnodes=${NNODES:-1}

gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
flags=(
    --nnodes="$nnodes"
    --nproc-per-node="${NPROC:-$((gpus > 0 ? gpus : 2))}"
    --max-restarts="${MAX_RESTARTS:-0}"
    --shutdown-timeout="${SAVE_SECONDS:-300}"
)
if [[ $nnodes == 1 ]]; then
    flags+=(--standalone)
else
    if [[ ${MASTER_ADDR:-localhost} == localhost ]]; then
        echo "run_train.sh: NNODES=$nnodes needs MASTER_ADDR, an address of node 0" >&2
        exit 2
    fi
    is_host=$([[ ${NODE_RANK:-0} == 0 ]] && echo true || echo false)
    flags+=(
        --rdzv-backend=c10d
        --rdzv-endpoint="$MASTER_ADDR:${MASTER_PORT:-29500}"
        --rdzv-id="${JOB_ID:-deepfm}"
        # How long an elastic run waits for more nodes once it has the fewest it needs.
        --rdzv-conf="is_host=$is_host,last_call_timeout=5"
    )
fi
if [[ -n ${LOCAL_ADDR:-} ]]; then
    flags+=(--local-addr="$LOCAL_ADDR")
fi
if [[ -n ${LOG_RANK:-} ]]; then
    flags+=(--local-ranks-filter="$LOG_RANK" --tee=3)
fi
what=(-m "deepfm_dist.${COMMAND:-train}" --config "${CONFIG:-sample}" "$@")
# torchrun sets these for each rank; another launcher's would be taken for them here.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
# torchrun would take a mistake in the settings for a lost rank, and start the ranks again.
python=${PYTHON:-$(dirname "$(command -v torchrun)")/python}
[[ -x $python || -n ${PYTHON:-} ]] || python=$(command -v python3 || command -v python)
"$python" "${what[@]}" --print-config >/dev/null
exec torchrun "${flags[@]}" "${what[@]}"
