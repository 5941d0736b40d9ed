# shellcheck shell=bash
# Environment variables of ranks on several hosts: sourced by multinode.sh (also in k8s.yaml) and
# slurm.sbatch. What is already set is kept. multinode.sh passes to other hosts the variables that
# begin with DS_ACCELERATOR, FI_, GLOO_, LINCLIP_, NCCL_, OMP_, PYTHON, TORCH_, TRITON_ or UCX_, and no others;
# srun and Kubernetes pass all.

# The network interface between the hosts, where there are several (a management network, docker0):
# a name, "^name" for all but that, or a prefix such as "ib". gloo takes names only; ranks
# use its connections for agreement besides training, so a GPU run needs both.
#   export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

# InfiniBand and RoCE cards, where NCCL should not use all it finds; on RoCE v2 the index of its GID
# (show_gids). NCCL_IB_DISABLE=1 falls back to TCP, to see whether InfiniBand is what fails. On AWS
# FI_PROVIDER=efa.
#   export NCCL_IB_HCA=mlx5 NCCL_IB_GID_INDEX=3

# NCCL prints errors; with INFO also the network and the algorithm that it has chosen.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# CPU threads of one rank. By default every rank would use all cores, and slow down the others.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
