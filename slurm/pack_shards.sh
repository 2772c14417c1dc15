#!/bin/bash
# sbatch slurm/pack_shards.sh NAME --root ROOT --out data/NAME.h5 [key=value ...]   raw data set -> maps -> shards in
# data/NAME, on a CPU node. Arguments as of `distseg prepare`. After an interruption it goes on where it was.
#SBATCH --job-name=distseg-pack
#SBATCH --nodes=1
#SBATCH --cpus-per-task=4
#SBATCH --time=4:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with: sbatch slurm/pack_shards.sh}"
[ -f slurm/job.sh ] || { echo "error: no slurm/job.sh in $PWD: call sbatch in the repository" >&2; exit 2; }
# shellcheck source=slurm/job.sh
source slurm/job.sh

out=
previous=
for word in "$@"; do
    case $previous/$word in
        --out/*) out=$word ;;
        */--out=*) out=${word#--out=} ;;
    esac
    previous=$word
done
[ -n "$out" ] || { echo "error: no --out FILE.h5: write for example --out data/voc.h5" >&2; exit 2; }
workers=${SLURM_CPUS_PER_TASK:-1}
"$python" -m distseg.cli prepare "$@" --workers "$workers"
exec "$python" -m distseg.cli pack "$out" --out "${out%.h5}" --workers "$workers"
