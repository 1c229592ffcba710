#!/usr/bin/env bash
# What fine-tuning under the budget gains on recall: against the same checkpoint training-free, against a control tuned
# for the same steps with full memory, and once more on a second base checkpoint (its folder as $1; made by
# `python train/pretrain_tiny.py --seed 1 --out DIR`). Half an hour a run on one core; resumes where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

tune() { # $1: name of the run; then overrides
    local name=$1
    shift
    python train/finetune.py --config tiny.yaml --resume auto "name=$name" "$@"
}

tune gain
tune gain-control 'tuning.budgets=[full]' evaluate.probes=false
python train/compare.py runs/gain runs/gain-control/eval/tuned --out runs/gain/against-control
if [ $# -gt 0 ]; then
    tune gain-second "model.path=$1" evaluate.probes=false
fi
