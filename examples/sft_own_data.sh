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

Started again with the same OUT it goes on where it stopped; with other DATA, HELDOUT, HF or SEQ_LENGTH it is refused.

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

# what a folder was made of: names and sizes of a model's files, the content of a JSONL file
source_of() { # PATH
  if [[ -d $1 ]]; then
    for file in "$1"/*; do [[ ! -f $file ]] || echo "${file##*/} $(wc -c <"$file")"; done
  else
    echo "cksum $(cksum <"$1") SEQ_LENGTH $SEQ_LENGTH"
  fi
}

same_source() { # FOLDER PATH: whether FOLDER exists; refuses one that was made of something else
  [[ -d $1 ]] || return 1
  if [[ -f $1.source && $(source_of "$2") != "$(cat "$1.source")" ]]; then
    echo "error: $1 was made of another $2, or for another SEQ_LENGTH: name another OUT, or delete $OUT" >&2
    exit 2
  fi
  echo "using $1, made of $2 before"
}

prepare() { # JSONL FOLDER
  same_source "$2" "$1" && return
  source_of "$1" >"$2.source"
  "$PYTHON" "$REPOSITORY/tools/prepare_data.py" --input "$1" --tokenizer "$HF" --output "$2" \
    --max-tokens $((SEQ_LENGTH + 1))
}

# every folder appears whole or not at all, so "it exists" means "it is finished"
mkdir -p "$OUT"
prepare "$DATA" "$OUT/train"
[[ -z ${HELDOUT:-} ]] || prepare "$HELDOUT" "$OUT/heldout"
if ! same_source "$OUT/base" "$HF"; then
  source_of "$HF" >"$OUT/base.source"
  "$PYTHON" "$REPOSITORY/tools/convert_checkpoint.py" import --hf "$HF" --megatron "$OUT/base"
fi
[[ -z ${HELDOUT:-} ]] || export EVAL_DATA="$OUT/heldout"
MODEL="$OUT/base" DATA="$OUT/train" SAVE="$OUT/checkpoint" SEQ_LENGTH=$SEQ_LENGTH TRAIN_ITERS=${TRAIN_ITERS:-100} \
  "$REPOSITORY/launch/pretrain_gpt_tsft.sh" "$@"
"$PYTHON" "$REPOSITORY/tools/convert_checkpoint.py" export --megatron "$OUT/checkpoint" --hf "$OUT/hf" --overwrite
echo "the new model: $OUT/hf; what each step logged: $OUT/checkpoint/metrics.jsonl"
