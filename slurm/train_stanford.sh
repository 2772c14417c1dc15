#!/bin/bash
# sbatch slurm/train_stanford.sh [key=value ...]   adversarial training on Stanford Background, on a whole node
#SBATCH --job-name=distseg-stanford
#SBATCH --nodes=1
#SBATCH --exclusive                # whole nodes, with all their GPUs; a part of one: --oversubscribe --gpus-per-node=2
#SBATCH --mem=0                    # all of their memory
#SBATCH --time=4:00:00             # of one turn: the job comes back until the run is done
#SBATCH --signal=B:USR1@300        # so many seconds before the time limit it saves
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with: sbatch slurm/train_stanford.sh}"
[ -f slurm/job.sh ] || { echo "error: no slurm/job.sh in $PWD: call sbatch in the repository" >&2; exit 2; }
# shellcheck source=slurm/job.sh
source slurm/job.sh
on_all_nodes distseg.train preset=stanford "$@"
