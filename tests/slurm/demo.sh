#!/bin/bash
# make slurm-demo: slurm/train_voc.sh on a cluster of this machine (tests/slurm/cluster.py), preempted once on its way.
#   tests/slurm/demo.sh SHARDS [key=value ...]    with the cluster's environment
set -euo pipefail
shards=$1
shift
run=runs/slurm-demo
export DISTSEG_RANKS_PER_NODE=2
rm -rf "$run"
small="segmentor=deeplabv3plus_efficientnet_lite0 segmentor.batch_norm=per_rank data.num_classes=null data.crop_px=128"
small+=" batch_size=8 steps=30 checkpoint.every_steps=10 evaluate.every_steps=0 discriminator=two_branch"
small+=" discriminator.options.width=0.25 tracking.wandb=disabled tracking.log_every=1"
# shellcheck disable=SC2086  # words
job=$(sbatch --parsable --output="$run-%j.out" --time=60 slurm/train_voc.sh $small "data.shards=$shards" "run_dir=$run" "$@")
echo "submitted batch job $job; its output: $run-$job.out"
touch "$run-$job.out"
tail -f "$run-$job.out" &
tail=$!
trap 'kill $tail' EXIT

state() { scontrol show job "$job" | grep -o "$1=[^ ]*" | head -n 1 | cut -d= -f2; }
until [ -d "$run/checkpoints/step-00000010" ] || [ "$(state JobState)" != RUNNING ] && [ "$(state JobState)" != PENDING ]; do
    sleep 1
done
echo "--- a job of a more urgent partition needs the nodes"
sbatch --partition=urgent --nodes=4 --exclusive --output=/dev/null --wrap "sleep 5"
while [ "$(state JobState)" != COMPLETED ]; do
    case $(state JobState) in FAILED | CANCELLED | TIMEOUT) break ;; esac
    sleep 1
done
sleep 1
echo "--- job $job: $(state JobState), restarts $(state Restarts)"
cat "$run/attempts.jsonl"
sed '/"confusion"/,$d' "$run/evaluation.json"
[ "$(state JobState)" = COMPLETED ]
