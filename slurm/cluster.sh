# shellcheck shell=bash
# What is particular to your cluster: the only file here that a site edits. As it is, it works with SLURM's defaults.
# Jobs source it on their first node; `distseg submit` and `distseg sweep` source it on the login node. For a plain
# `sbatch slurm/train_voc.sh` to know partition and account, source it in your shell too:  . slurm/cluster.sh

# --- submission: sbatch reads these; its command line wins over them, and they win over the #SBATCH lines
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=my_project
# export SBATCH_QOS=normal
# export SBATCH_TIMELIMIT=8:00:00

# --- inside the job
# module load cuda/12.8
# export NCCL_SOCKET_IFNAME=ib0        # when NCCL or gloo choose the wrong network
# export GLOO_SOCKET_IFNAME=ib0
# export DISTSEG_PYTHON=/shared/env/bin/python     # default: .venv/bin/python of the repository, else python3
# export DISTSEG_RANKS_PER_NODE=8      # default: one for each GPU that the job has on a node; without GPUs one
# export DISTSEG_STOP_SECONDS=240      # how long ranks may take to save before the time limit; below --signal's seconds
# export DISTSEG_PAUSE_SECONDS=330     # before the last of three tries: above SlurmdTimeout (scontrol show config)

# export DISTSEG_HEALTH_SECONDS=120    # within which each node has to say that it is fit, before each start; 0: none asked
# export DISTSEG_MIN_NODES=2           # with so few nodes a job may go on, when others are lost or not fit: docs/clusters.md

# --- in a container: what starts Python on the nodes, after srun's options; docs/containers.md
# export DISTSEG_NODE_PYTHON="apptainer exec --nv --bind /shared /shared/distseg.sif python"
# export DISTSEG_NODE_PYTHON="--container-image=/shared/distseg.sqsh --container-mounts=/shared:/shared --container-workdir=$PWD python"
