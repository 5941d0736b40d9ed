#!/usr/bin/env bash
# Train on this machine: launch/local.sh CONFIG.yaml [key=value ...]
# One rank per GPU, or RANKS (default 2) gloo ranks on the CPU where there is no GPU.
set -euo pipefail

bin="$(dirname "$0")/../.venv/bin"
[ -x "$bin/deepspeed" ] || bin="$(dirname "$(command -v deepspeed)")"

gpus=$("$bin/python" -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
    ranks=${RANKS:-$gpus}
else
    ranks=${RANKS:-2}
    export DS_ACCELERATOR=cpu
    # Share the cores out, or the ranks' thread pools fight for them.
    cores=$(nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
fi

export PATH="$bin:$PATH"
exec deepspeed --quiet --num_gpus "$ranks" "$(dirname "$0")/train.py" "$@"
