#!/usr/bin/env bash
# All that there is to measure on a GPU, in at most eight minutes and without a network:
#   benchmarks/on_a_gpu.sh OUT [--dry_run]
# OUT takes, as soon as each is there: parts.jsonl (what ran, how it ended, seconds), test_cuda.xml, speed_*/speed.json,
# steps.json (kernels and waits of a step), gpt/*/summary.json, gpt.md. PYTHON names another interpreter than python.
# --dry_run: on the CPU with tiny sizes, to find typing errors before the first minute on a card.
set -uo pipefail
cd "$(dirname "$0")/.."
if [[ $# -lt 1 || $1 == -* ]]; then
  echo "usage: benchmarks/on_a_gpu.sh OUT [--dry_run]" >&2
  exit 2
fi
out=$(realpath -m "$1")
dry=${2:-}
mkdir -p "$out"
python=${PYTHON:-python}
failed=0

part() { # NAME LIMIT_IN_SECONDS COMMAND …
  local name=$1 limit=$(($2 * patience)) start=$SECONDS status=0
  shift 2
  echo "== $name (at most $limit s)"
  timeout --signal=TERM --kill-after=15 "$limit" "$@" > "$out/$name.log" 2>&1 || status=$?
  echo "{\"part\": \"$name\", \"exit_status\": $status, \"seconds\": $((SECONDS - start)), \"limit\": $limit}" |
    tee -a "$out/parts.jsonl"
  if ((status)); then
    failed=1
    tail -n 3 "$out/$name.log"
  fi
}

patience=1
if [[ $dry == --dry_run ]]; then
  patience=5 # a slow CPU is no typing error
  device=cpu speeds=(cnn_256:micro_batch) precisions=(bf16-mixed) budget=0.1
  gpt=(--model_args.layers=1 --model_args.heads=2 --model_args.width=32 --dataset_args.sequence_length=32)
  gpt+=(--max_samples=256 --eval_samples=128 --validation_samples=32 --max_micro_batch_size=32 --knee=64)
  small=8 large=64
else
  device=cuda precisions=(32-true bf16-mixed) budget=3
  speeds=(resnet18_224:micro_batch resnet50_224:micro_batch vit_b_16_64:ghost vit_b_16_64:micro_batch)
  speeds+=(gpt_124m:ghost gpt_124m:micro_batch)
  # 10.7 million parameters; 16 to 1,024 sequences of 256 bytes are 2¹² to 2¹⁸ tokens.
  gpt=(--model_args.layers=6 --model_args.heads=6 --model_args.width=384 --max_batch_size=1024 --precision=bf16-mixed)
  gpt+=(--max_samples=60000 --eval_samples=2000 --validation_samples=512)
  small=64 large=512
fi

part test_cuda 120 "$python" -m pytest checks/test_cuda.py -q -p no:cacheprovider --junitxml="$out/test_cuda.xml"
for precision in "${precisions[@]}"; do
  for speed in "${speeds[@]}"; do
    part "speed_$precision-${speed/:/-}" 25 "$python" -m benchmarks.speed --cases="[${speed%:*}]" \
      --methods="[${speed#*:}]" --tests='[norm]' --precision="$precision" --budget="$budget" --out="$out/speed_$precision"
  done
done
part steps 30 "$python" -m benchmarks.kernels --device="$device" --out="$out/steps.json"
gpt+=(--dataset=stdlib --model=gpt --optimizer=adamw --learning_rate=0.001 --decay_lr=False --devices=1)
gpt+=(--accelerator="$device" --out_dir="$out/gpt" --log_interval=20 --checkpoint_minutes=0 --monitor_interval=20)
for size in "$small" "$large"; do
  part "constant_$size" 45 "$python" main.py "${gpt[@]}" --test=False --batch_size="$size" --run_name="constant_$size"
done
part steady 45 "$python" main.py "${gpt[@]}" --recipe=steady --batch_size=16 --run_name=steady
part report 20 "$python" report.py "$out/gpt" --target=2.0
mv "$out/report.log" "$out/gpt.md"
exit $failed
