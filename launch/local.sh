#!/usr/bin/env bash
# Train on this machine: launch/local.sh CONFIG.yaml [key=value ...]
# RANKS sets the number of ranks; default: one per visible GPU, or two gloo ranks on the CPU where
# there is no GPU. The ranks must divide train.global_batch_size.
set -euo pipefail

bin="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin"
[ -x "$bin/deepspeed" ] || { echo "error: $bin/deepspeed is missing: run make install" >&2; exit 2; }

gpus=$("$bin/python" -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
    # Without --num_gpus the launcher honours CUDA_VISIBLE_DEVICES.
    count=(${RANKS:+--num_gpus "$RANKS"})
else
    ranks=${RANKS:-2}
    count=(--num_gpus "$ranks")
    export DS_ACCELERATOR=cpu
    # Divide the cores between the ranks, or their threads slow each other down.
    cores=$(nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
fi

export PATH="$bin:$PATH"
exec deepspeed --quiet "${count[@]}" --module linclip_launch.train "$@"
