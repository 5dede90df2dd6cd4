#!/usr/bin/env bash
# Your own JSONL and your own Hugging Face folder: prepare, import, fine-tune with Target-SFT, export.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: HF=DIR DATA=FILE.jsonl OUT=DIR [VARIABLE=value ...] examples/sft_own_data.sh [flags of the training run ...]

required
  HF             the Hugging Face folder of a Llama-shaped model (safetensors, config, tokenizer)
  DATA           a JSONL file whose rows have "messages", or "prompt" and "completion"
  OUT            the folder for everything: train/, heldout/, base/, checkpoint/, hf/ (the new model)
optional
  HELDOUT        a JSONL file to evaluate on
  SEQ_LENGTH     positions of a pack, default 2048; longer conversations are truncated and counted
  and every variable of launch/pretrain_gpt_tsft.sh --help: OBJECTIVE, TEACHER, TP, PP, GBS, LR, TRAIN_ITERS, DEVICE ...
                 (TRAIN_ITERS defaults to 100)

Started again with the same OUT it goes on where it stopped.

example
  HF=models/Llama-3.2-1B DATA=chats.jsonl HELDOUT=heldout.jsonl OUT=runs/mine TP=2 TRAIN_ITERS=500 \
    examples/sft_own_data.sh --recompute-activations
EOF
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  usage
  exit 0
fi
for name in HF DATA OUT; do
  [[ -n ${!name:-} ]] || { echo "error: $name is not set; examples/sft_own_data.sh --help says what it is" >&2; exit 2; }
done

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z ${PYTHON:-} ]]; then
  PYTHON="$REPOSITORY/.venv/bin/python"
  [[ -x $PYTHON ]] || PYTHON=python3
fi
export PYTHON HF_HUB_OFFLINE=1 PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
SEQ_LENGTH=${SEQ_LENGTH:-2048}

prepare() { # JSONL FOLDER
  if [[ -d $2 ]]; then
    echo "using $2, prepared before; delete it to prepare $1 again"
    return
  fi
  "$PYTHON" "$REPOSITORY/tools/prepare_data.py" --input "$1" --tokenizer "$HF" --output "$2" \
    --max-tokens $((SEQ_LENGTH + 1))
}

# every folder appears whole or not at all, so "it exists" means "it is finished"
prepare "$DATA" "$OUT/train"
[[ -z ${HELDOUT:-} ]] || prepare "$HELDOUT" "$OUT/heldout"
if [[ -d $OUT/base ]]; then
  echo "using $OUT/base, imported before; delete it to import $HF again"
else
  "$PYTHON" "$REPOSITORY/tools/convert_checkpoint.py" import --hf "$HF" --megatron "$OUT/base"
fi
[[ -z ${HELDOUT:-} ]] || export EVAL_DATA="$OUT/heldout"
MODEL="$OUT/base" DATA="$OUT/train" SAVE="$OUT/checkpoint" SEQ_LENGTH=$SEQ_LENGTH TRAIN_ITERS=${TRAIN_ITERS:-100} \
  "$REPOSITORY/launch/pretrain_gpt_tsft.sh" "$@"
rm -rf "$OUT/hf"
"$PYTHON" "$REPOSITORY/tools/convert_checkpoint.py" export --megatron "$OUT/checkpoint" --hf "$OUT/hf"
echo "the new model: $OUT/hf; what each step logged: $OUT/checkpoint/metrics.jsonl"
