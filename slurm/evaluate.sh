#!/bin/bash
# sbatch slurm/evaluate.sh RUN [--checkpoint best] [key=value ...]   scores a run, on a whole node
#SBATCH --job-name=distseg-evaluate
#SBATCH --nodes=1
#SBATCH --exclusive                # whole nodes, with all their GPUs; a part of one: --oversubscribe --gpus-per-node=2
#SBATCH --mem=0                    # all of their memory
#SBATCH --time=4:00:00             # must suffice for all of it: nothing is saved on the way. A job that is not done begins anew,
                                   # and after three such turns it is FAILED
#SBATCH --signal=B:USR1@300        # so many seconds before the time limit it stops
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with: sbatch slurm/evaluate.sh}"
[ -f slurm/job.sh ] || { echo "error: no slurm/job.sh in $PWD: call sbatch in the repository" >&2; exit 2; }
# shellcheck source=slurm/job.sh
source slurm/job.sh
on_all_nodes distseg.evaluate "$@"
