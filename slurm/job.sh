# shellcheck shell=bash
# The common beginning of the scripts here, sourced by them in the folder that `sbatch` was called in.

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
