#!/usr/bin/env bash
# The paper's experiments by name, and grids over them; the same words after `sbatch` run under Slurm.
#   ./expt.sh                                                    lists the experiments
#   ./expt.sh NAME [options…]                                    runs one; later options override
#   ./expt.sh sweep NAME --eta=0.05,0.1 --seed=1,2,3 [options…]  runs a grid; --dry-run lists its points
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
home=$(dirname "${BASH_SOURCE[0]}")
if [[ ! -f $home/main.py && -n ${SLURM_JOB_ID:-} ]]; then # sbatch runs a copy of this file, elsewhere
  home=$(dirname "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p' | head -n 1)")
fi
cd "$home"
[[ -x .venv/bin/fabric ]] && PATH="$PWD/.venv/bin:$PATH"

declare -A about options
names=()
experiment() { names+=("$1"); about[$1]=$2; options[$1]=$3; }

# baselines NAME SMALL MIDDLE LARGE INCREMENT: the same training without a test. The increment brings the linear ramp
# to LARGE by about the middle of the run.
baselines() {
  local what="${about[$1]%%,*}" same="${options[$1]} --test=False"
  experiment "$1_small" "$what, constant batch of $2" "$same --batch_size=$2"
  experiment "$1_large" "$what, constant batch of $4" "$same --batch_size=$4"
  experiment "$1_stagewise" "$what, batches of $2, $3, $4 for a third of the samples each" \
    "$same --stagewise_ramp_up=True --global_batch_sizes=[$2,$3,$4]"
  experiment "$1_linear" "$what, batch from $2 to $4, $5 larger every step" \
    "$same --batch_size=$2 --max_batch_size=$4 --linear_ramp_up=True --linear_ramp_up_increment=$5"
}

mnist="--num_workers=0 --optimizer=adagrad --max_batch_size=60000 --learning_rate=8e-3 --max_lr=8e-3 --decay_lr=False
  --max_samples=6000000 --dataset=mnist --test_type=norm --eta=1e-1"
cifar="--num_workers=0 --max_batch_size=50000 --max_samples=10000000 --warmup_samples=1000000 --lr_decay_samples=9000000"
resnet50="--devices=4 $cifar --optimizer=sgdm --batch_size=256 --max_test_micro_batch_size=64 --max_micro_batch_size=100
  --learning_rate=5e-1 --min_lr=5e-2 --model=resnet50"

experiment logistic "logistic regression on MNIST, norm test, η = 0.1" \
  "--devices=1 $mnist --batch_size=2 --max_test_micro_batch_size=60000 --model=logistic"
baselines logistic 16 256 4096 3
experiment cnn "CNN on MNIST, norm test, η = 0.1" \
  "--devices=4 $mnist --batch_size=8 --max_test_micro_batch_size=15000 --model=cnn"
baselines cnn 16 256 4096 3
experiment resnet18 "ResNet-18 on CIFAR-10, norm test, η = 0.5" \
  "--devices=4 $cifar --optimizer=adagrad --batch_size=8 --max_test_micro_batch_size=100 --max_micro_batch_size=128
  --learning_rate=5e-2 --min_lr=5e-3 --model=resnet18 --dataset=cifar10 --test_type=norm --eta=5e-1"
baselines resnet18 128 1024 4096 2
experiment resnet50 "ResNet-50 on CIFAR-10, norm test, η = 0.25" \
  "$resnet50 --dataset=cifar10 --test_type=norm --eta=2.5e-1"
baselines resnet50 256 1024 4096 2
experiment resnet50_cifar100 "ResNet-50 on CIFAR-100, norm test, η = 0.25" \
  "$resnet50 --dataset=cifar100 --test_type=norm --eta=2.5e-1"
baselines resnet50_cifar100 256 1024 4096 2
experiment resnet50_cifar100_ip "ResNet-50 on CIFAR-100, augmented inner product test, θ = 0.5, ν = 1 (same baselines)" \
  "$resnet50 --dataset=cifar100 --test_type=ip+orth --theta=5e-1 --nu=1e0"
experiment resnet101 "ResNet-101 on ImageNet, norm test, η = 0.1" \
  "--devices=4 --num_workers=12 --precision=bf16-mixed --optimizer=sgdm --data_dir=/data/imagenet-gen/ --batch_size=256
  --max_test_micro_batch_size=64 --max_micro_batch_size=512 --max_batch_size=111360 --max_samples=256233400
  --warmup_samples=6405835 --lr_decay_samples=249827565 --learning_rate=2.5e0 --min_lr=2.5e-1
  --weight_decay=1e-4 --gradient_accumulation_steps=1 --model=resnet101 --dataset=imagenet --test_type=norm --eta=1e-1"
baselines resnet101 256 1024 8192 1

refuse() {
  echo "expt.sh: error: $1" >&2
  exit 2
}

# plain: passes text on; letters that this terminal does not have come by name, as in the programs in Python.
plain() { python -m launch.terminals 2>/dev/null || cat; }

# expanded PATH: ~ and $NAME as in every option that takes a path.
expanded() {
  if [[ $1 == *[~\$]* ]]; then
    python -c 'import sys; from options.names import expanded; print(expanded("out_dir", sys.argv[1]))' "$1" 2>/dev/null ||
      refuse "--out_dir=$1: there is no such user or variable: write the path itself"
  else
    echo "$1"
  fi
}

# run_training OPTION…: one run; by `fabric run`, under Slurm by `srun`, one process a task of the allocation. Where its
# time is up (USR1 comes 120 s before the limit) the run has saved itself, and the job goes back to the queue. After TERM
# it does not: `scancel` means it, and a job that is preempted Slurm requeues itself.
run_training() {
  local status=0
  if [[ -z ${SLURM_JOB_ID:-} ]]; then
    fabric run main.py "${@/#--nu=/--config=nu: }" # whose parser takes --nu for another option (docs/running.md)
    return
  fi
  trap : USR1 TERM # the tasks get them, too; this script stays to see how they end
  srun --kill-on-bad-exit=1 python main.py "$@" || status=$?
  # 85: interrupted by USR1; 138: ended by it before training began. 75 and 143: the same by TERM.
  if [[ $status -eq 85 || $status -eq 138 ]]; then
    # An array's last task has the number of the whole array, which would all be requeued.
    scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
  fi
  if [[ $status =~ ^(75|85|138|143)$ ]]; then exit "$status"; fi # no further points of a sweep
  return "$status"
}

# run_experiment NAME [OPTION…]
run_experiment() {
  [[ -n ${options[$1]:-} ]] || refuse "no experiment '$1' (./expt.sh lists them)"
  local words
  read -rd '' -a words <<<"${options[$1]}" || true # the end of the text ends it
  run_training "${words[@]}" "${@:2}"
}

# choose_point I: the I-th point of the grid `given`, in `point`; the last option varies fastest. False past the end.
choose_point() {
  local rest=$1 k values
  point=("${given[@]}")
  for ((k = ${#given[@]} - 1; k >= 0; k--)); do
    [[ ${given[k]} == *,* && ${given[k]#*=} != [[{]* ]] || continue # a list in brackets is one value
    IFS=, read -ra values <<<"${given[k]#*=}"
    point[k]="${given[k]%%=*}=${values[rest % ${#values[@]}]}"
    rest=$((rest / ${#values[@]}))
  done
  return $((rest > 0))
}

# run_name NAME: the experiment and every option of `point` that matters, so that the same point finds its run again.
run_name() {
  local word joined=$1
  for word in "${point[@]#--}"; do
    [[ $word == @(data_dir|main-port|main_port)=* ]] || joined+="_${word/=/}"
  done
  echo "${joined//[\/: ]/.}"
}

# run_status FOLDER: finished, diverged, …; "unfinished" without a summary, "not started" without a folder.
run_status() {
  if [[ -f $1/summary.json ]]; then
    sed -n 's/^ *"status": "\([^"]*\)".*/\1/p' "$1/summary.json"
  elif [[ -d $1 ]]; then
    echo unfinished
  else
    echo "not started"
  fi
}

# sweep NAME OPTION…: values with commas span a grid. One after the other; as a Slurm array each task takes its point.
sweep() {
  local name=${1:-} word out_dir=out dry_run='' given=() point=() failed=() folder status i
  [[ -n $name && -n ${options[$name]:-} ]] || refuse "sweep needs the name of an experiment, not '$name' (./expt.sh lists them)"
  for word in "${@:2}"; do
    case $word in
      --dry-run) dry_run=yes ;;
      --out_dir=*) out_dir=$(expanded "${word#*=}") ;;
      --run_name=*) refuse "--run_name: a sweep names its runs itself; choose --out_dir=FOLDER instead" ;;
      --*=*) given+=("$word") ;;
      *) refuse "'$word': the options of a sweep are written --NAME=VALUE or --NAME=VALUE,VALUE" ;;
    esac
  done
  trap 'exit 130' INT # ends the sweep with the run that it interrupts
  local first=${SLURM_ARRAY_TASK_ID:-0}
  for ((i = first; i == first || ${SLURM_ARRAY_TASK_ID:--1} < 0; i++)); do
    choose_point "$i" || break
    folder=$out_dir/$(run_name "$name")
    status=$(run_status "$folder")
    printf '%3d  %-12s %s\n' "$i" "$status" "$folder"
    if [[ -n $dry_run || $status == finished ]]; then continue; fi
    if [[ $status == diverged ]]; then # it would again
      failed+=("$folder (diverged)")
    else
      run_experiment "$name" "${point[@]}" "--out_dir=$out_dir" "--run_name=${folder##*/}" --resume=auto ||
        failed+=("$folder (exit status $?)")
    fi
  done
  ((i > first)) || refuse "the grid has no point $first: submit as many array tasks as --dry-run lists, from 0"
  if [[ ${#failed[@]} -gt 0 ]]; then
    printf '%d not finished:\n' "${#failed[@]}" >&2
    printf '  %s\n' "${failed[@]}" >&2
    return 1
  fi
}

case ${1:-} in
  '')
    {
      sed -n '3,5s/^# *//p' "${BASH_SOURCE[0]}"
      echo
      for name in "${names[@]}"; do printf '  %-28s %s\n' "$name" "${about[$name]}"; done
    } | plain
    ;;
  sweep) sweep "${@:2}" ;;
  *)
    run=()
    if [[ -n ${SLURM_JOB_ID:-} ]]; then # named after the job, so that it finds itself again; an array's task is a seed
      task=${SLURM_ARRAY_TASK_ID:-}
      run=(--run_name="slurm-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${task:+-$task}" --resume=auto ${task:+--seed="$task"})
    fi
    run_experiment "$1" "${run[@]}" "${@:2}"
    ;;
esac
