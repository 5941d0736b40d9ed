# shellcheck shell=bash
# What ranks on several hosts find in their environment: sourced by multinode.sh, slurm.sbatch and
# k8s.yaml. What is set already stays. From the host of multinode.sh variables whose names begin
# with DS_ACCELERATOR, FI_, GLOO_, NCCL_, OMP_, PYTHON, TORCH_, TRITON_ or UCX_ go to all others, and
# so do the lines KEY=value of a file .deepspeed_env in the home or the current folder. They stand on
# command lines there: secrets belong elsewhere.

# The network interface between the hosts, where there are several (a management network, docker0):
# a name, "^name" for all but that, or a prefix such as "ib". gloo takes names only; its connections
# carry what ranks agree on besides training, so a GPU run needs both.
#   export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

# InfiniBand and RoCE cards, where NCCL should not use all it finds; on RoCE v2 the index of its GID
# (show_gids). NCCL_IB_DISABLE=1 falls back to TCP, to see whether InfiniBand is what fails. On AWS
# FI_PROVIDER=efa.
#   export NCCL_IB_HCA=mlx5 NCCL_IB_GID_INDEX=3

# NCCL says what went wrong; INFO also says which network and which algorithm it has chosen.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Threads of one rank on the CPU. Left alone every rank takes all cores, and they fight for them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# A host that has lost its power says nothing: ssh asks it every 15 s and gives up after a minute.
# (Only for pdsh, on the host of multinode.sh.)
export PDSH_SSH_ARGS_APPEND=${PDSH_SSH_ARGS_APPEND:--o ServerAliveInterval=15 -o ServerAliveCountMax=4}
