#!/usr/bin/env bash
# Experiments of the paper by name:  ./expt.sh  lists them,  ./expt.sh NAME [options…]  runs one; later options override.
# On a cluster, unchanged:  sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 expt.sh NAME [options…]
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
if [[ ! -f $here/main.py && -n ${SLURM_JOB_ID:-} ]]; then  # sbatch runs a copy of this file, elsewhere
  here=$(dirname "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p' | head -n 1)")
fi
cd "$here"
[[ -x .venv/bin/fabric ]] && PATH="$PWD/.venv/bin:$PATH"

mnist="--num_workers=0 --optimizer=adagrad --max_batch_size=60000 --learning_rate=8e-3 --max_lr=8e-3 --decay_lr=False
  --max_samples=6000000 --dataset=mnist --test_type=norm --eta=1e-1"
cifar="--num_workers=0 --max_batch_size=50000 --max_samples=10000000 --warmup_samples=1000000 --lr_decay_samples=9000000"
resnet50="--devices=4 $cifar --optimizer=sgdm --batch_size=256 --max_test_micro_batch_size=64 --max_micro_batch_size=100
  --learning_rate=5e-1 --min_lr=5e-2 --model=resnet50"

declare -A about options
names=()
experiment() { names+=("$1"); about[$1]=$2; options[$1]=$3; }

experiment logistic "logistic regression on MNIST, norm test, η = 0.1" \
  "--devices=1 $mnist --batch_size=2 --max_test_micro_batch_size=60000 --model=logistic"
experiment cnn "CNN on MNIST, norm test, η = 0.1" \
  "--devices=4 $mnist --batch_size=8 --max_test_micro_batch_size=15000 --model=cnn"
experiment resnet18 "ResNet-18 on CIFAR-10, norm test, η = 0.5" \
  "--devices=4 $cifar --optimizer=adagrad --batch_size=8 --max_test_micro_batch_size=100 --max_micro_batch_size=128
  --learning_rate=5e-2 --min_lr=5e-3 --model=resnet18 --dataset=cifar10 --test_type=norm --eta=5e-1"
experiment resnet50 "ResNet-50 on CIFAR-10, norm test, η = 0.25" \
  "$resnet50 --dataset=cifar10 --test_type=norm --eta=2.5e-1"
experiment resnet50_cifar100 "ResNet-50 on CIFAR-100, norm test, η = 0.25" \
  "$resnet50 --dataset=cifar100 --test_type=norm --eta=2.5e-1"
experiment resnet50_cifar100_ip "ResNet-50 on CIFAR-100, augmented inner product test, θ = 0.5, ν = 1" \
  "$resnet50 --dataset=cifar100 --test_type=ip+orth --theta=5e-1 --nu=1e0"

# run_training OPTIONS…: on this machine by `fabric run`; under Slurm by `srun`, one process a task of the allocation.
# There the run is named after the job, an array's task is a seed, and a run that a signal interrupts (USR1 comes 120 s
# before the time limit) has saved a checkpoint: the job goes back to the queue and resumes by itself.
run_training() {
  if [[ -z ${SLURM_JOB_ID:-} ]]; then exec fabric run main.py "$@"; fi
  local task=${SLURM_ARRAY_TASK_ID:-} status=0
  local run=(--run_name="slurm-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${task:+-$task}" --resume=auto ${task:+--seed="$task"})
  trap : USR1 TERM # the tasks get them, too; this script stays to see how they end
  srun --kill-on-bad-exit=1 python main.py "${run[@]}" "$@" || status=$?
  # 75: interrupted; 138: by USR1 itself, before the program could attend to it (nothing is lost then, either).
  if [[ $status -eq 75 || $status -eq 138 ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
  exit "$status"
}

if [[ $# -eq 0 ]]; then
  echo "usage: ./expt.sh NAME [options…]"
  for name in "${names[@]}"; do printf '  %-22s %s\n' "$name" "${about[$name]}"; done
  exit 0
fi
name=$1
shift
if [[ -z ${options[$name]:-} ]]; then
  echo "expt.sh: error: no experiment '$name'; there are: ${names[*]}" >&2
  exit 2
fi
# shellcheck disable=SC2086  # the options are words
run_training ${options[$name]} "$@"
