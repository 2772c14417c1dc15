# shellcheck shell=bash
# The common beginning of the scripts here, sourced by them in the folder that `sbatch` was called in.

# sbatch passes on what an interactive allocation had (salloc, srun --pty): options of its steps, which srun would
# take for this job's, or end over. Without any, a step has what its job has. Before cluster.sh, whose choices stand.
unset "${!SLURM_STEP@}" "${!SLURM_MEM_@}" "${!SLURM_GPUS_PER_@}" "${!SLURM_GPU_@}" "${!SLURM_NTASKS@}" \
    "${!SLURM_CPU_@}" "${!SLURM_TRES_@}" "${!SLURM_SRUN_@}" "${!SLURM_PTY_@}" SLURM_GPUS SLURM_NPROCS \
    SLURM_CPUS_PER_GPU SLURM_CORE_SPEC SLURM_DISTRIBUTION SLURM_EXACT SLURM_EXCLUSIVE SLURM_HINT SLURM_HOSTFILE \
    SLURM_THREADS_PER_CORE
# shellcheck source=slurm/cluster.sh
source slurm/cluster.sh
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${DISTSEG_PYTHON:-$PWD/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3) || { echo "error: no python3: set DISTSEG_PYTHON in slurm/cluster.sh" >&2; exit 2; }
export DISTSEG_PYTHON=$python

# on_all_nodes MODULE ARGUMENT...: the last line of a script. It becomes the process that SLURM sends its signals to.
on_all_nodes() {
    trap '' USR1 USR2 TERM  # until it is ready to answer them: without this they would end the job for good
    exec "$python" -m launchers.supervisor "$@"
}
