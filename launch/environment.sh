# shellcheck shell=bash
# What ranks on several hosts find in their environment: sourced by multinode.sh, slurm.sbatch and
# k8s.yaml. What is set already stays. multinode.sh gives the ranks of other hosts the variables that
# begin with DS_ACCELERATOR, FI_, GLOO_, NCCL_, OMP_, PYTHON, TORCH_, TRITON_ or UCX_, and no others;
# srun and Kubernetes give them all.

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
