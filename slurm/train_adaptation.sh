#!/bin/bash
# sbatch [--nodes=4 ...] slurm/train_adaptation.sh [key=value ...]   from GTA5 to Cityscapes, on whole nodes
#SBATCH --job-name=distseg-adaptation
#SBATCH --nodes=1
#SBATCH --exclusive                # whole nodes, with all their GPUs; a part of one: --oversubscribe --gpus-per-node=2
#SBATCH --mem=0                    # all of their memory
#SBATCH --time=4:00:00             # of one turn: the job comes back until the run is done
#SBATCH --signal=B:USR1@300        # so many seconds before the time limit it saves
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with: sbatch slurm/train_adaptation.sh}"
[ -f slurm/job.sh ] || { echo "error: no slurm/job.sh in $PWD: call sbatch in the repository" >&2; exit 2; }
# shellcheck source=slurm/job.sh
source slurm/job.sh
# batches of eight, so that eight GPUs have one image of each domain; the published ones are of one image
on_all_nodes distseg.train preset=gta5_cityscapes_adaptsegnet batch_size=8 semi.batch_size=8 "$@"
