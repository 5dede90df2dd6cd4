#!/usr/bin/env bash
# Start one fine-tuning run with torchrun, on one node or as one node of several, on GPUs or on CPU.
set -euo pipefail

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PRESETS="$REPOSITORY/launch/presets"

usage() {
  cat <<'EOF'
usage: VARIABLE=value ... launch/pretrain_gpt_tsft.sh [any flag of Megatron's or --tsft-* flag ...]

Flags given on the command line come last and win over what the variables set.

required
  MODEL            the folder that `tools/convert_checkpoint.py import` wrote
  DATA             the folder that `tools/prepare_data.py` wrote, or several, each with a share and an objective:
                   "a:0.7:target-sft,eta=0.5 b:0.3:sft"
  SAVE             the folder for checkpoints, metrics.jsonl and tensorboard/; a run that finds its own checkpoint
                   there resumes
  TRAIN_ITERS      how many optimizer steps are made

objective
  OBJECTIVE        default target-sft; OBJECTIVE_ARGS="name=value ..." (default eta=0.5 for target-sft)
  TEACHER          where the second distribution comes from: none, reference (the model before this run), model
                   (another one) or cache (default: model where TEACHER_LOAD is set, cache where TEACHER_CACHE is,
                   reference where an objective needs a teacher, else none)
  TEACHER_LOAD     the imported folder of the other model
  TEACHER_CACHE    the folders that `tools/cache_teacher.py` wrote
  EVAL_DATA        a prepared folder of held-out conversations; EVAL_INTERVAL is the number of steps between its
                   evaluations (default: one evaluation, at the end)

optimization
  LR               the highest learning rate, default 1e-5; MIN_LR default LR/10; LR_DECAY_STYLE default cosine;
                   WARMUP_ITERS default 0
  WEIGHT_DECAY     default 0; CLIP_GRAD default 1.0; ADAM_BETA1 default 0.9; ADAM_BETA2 default 0.95; SEED default 1234
  MBS, GBS         the micro-batch and the global batch, in sequences; default 1 and 32
  SEQ_LENGTH       positions of a sequence, default 4096; DTYPE bf16, fp16 or fp32 (default bf16 on GPUs, fp32 on CPU)
  GRAD_REDUCE      fp32 or bf16: the type in which gradients of a bf16 model are accumulated and reduced (default
                   fp32; a PRESET may make it bf16, and GRAD_REDUCE=fp32 keeps fp32)
  SAVE_INTERVAL    steps between checkpoints, default 200; one more is written at the end; LOG_INTERVAL default 1

precision of some hardware (GPUs only); a variable that is set wins over the preset
  PRESET           one of these (default: none)
EOF
  list_presets
  cat <<'EOF'

layout
  TP, PP, CP       tensor, pipeline and context parallel sizes, default 1 each; what is left is data parallel
  SEQUENCE_PARALLEL  1 or 0 (default 1 on GPUs with TP > 1)
  GPUS_PER_NODE    processes on this node (default: CUDA_VISIBLE_DEVICES or nvidia-smi's list; on CPU, TP*PP*CP)
  NUM_NODES        default 1; more need NODE_RANK and MASTER_ADDR, and take MASTER_PORT (default 6000)
  MASTER_PORT      on one node a free port is taken where this is not set
  DEVICE           cuda or cpu (default: cuda where nvidia-smi finds a GPU); PYTHON default: .venv's, else python3
  DRY_RUN          1 prints the command and starts nothing

examples
  MODEL=base DATA=data/train SAVE=runs/a TRAIN_ITERS=1000 TP=2 launch/pretrain_gpt_tsft.sh --recompute-activations
  DEVICE=cpu MODEL=base DATA=data/train SAVE=runs/b TRAIN_ITERS=4 GBS=2 SEQ_LENGTH=256 launch/pretrain_gpt_tsft.sh
  PRESET=h100-fp8-tensorwise MODEL=base DATA=data/train SAVE=runs/c TRAIN_ITERS=1000 launch/pretrain_gpt_tsft.sh
  NUM_NODES=2 NODE_RANK=0 MASTER_ADDR=node0 MODEL=... (and the same with NODE_RANK=1 on the other node)
EOF
}

list_presets() {  # name and first comment line of each
  for file in "$PRESETS"/*.sh; do
    printf '    %-20s %s\n' "$(basename "$file" .sh)" "$(sed -n '1s/^# //p' "$file")"
  done
}

fail() {
  echo "error: $1" >&2
  exit 2
}

whole_number() {  # NAME MINIMUM: the variable holds an integer of at least MINIMUM
  [[ ${!1} =~ ^[0-9]+$ && ${!1} -ge $2 ]] || fail "$1=${!1} is not a whole number of at least $2"
}

KNOWN="MODEL DATA SAVE TRAIN_ITERS OBJECTIVE OBJECTIVE_ARGS TEACHER TEACHER_LOAD TEACHER_CACHE EVAL_DATA EVAL_INTERVAL
  LR MIN_LR LR_DECAY_STYLE WARMUP_ITERS WEIGHT_DECAY CLIP_GRAD ADAM_BETA1 ADAM_BETA2 SEED MBS GBS SEQ_LENGTH DTYPE
  GRAD_REDUCE SAVE_INTERVAL LOG_INTERVAL PRESET TP PP CP SEQUENCE_PARALLEL GPUS_PER_NODE NUM_NODES NODE_RANK
  MASTER_ADDR MASTER_PORT DEVICE PYTHON DRY_RUN"

check_names() { # NAME ...: refuse variables of the environment that look like a mistyped one of KNOWN
  awk -v known="$KNOWN" -v names="$*" '
    function least(a, b) { return a < b ? a : b }
    function distance(a, b,    i, j, cost, d) { # insertions, deletions, substitutions, swaps of neighbours
      for (i = 0; i <= length(a); i++) d[i, 0] = i
      for (j = 0; j <= length(b); j++) d[0, j] = j
      for (i = 1; i <= length(a); i++)
        for (j = 1; j <= length(b); j++) {
          cost = substr(a, i, 1) != substr(b, j, 1)
          d[i, j] = least(least(d[i - 1, j] + 1, d[i, j - 1] + 1), d[i - 1, j - 1] + cost)
          if (i > 1 && j > 1 && substr(a, i, 1) == substr(b, j - 1, 1) && substr(a, i - 1, 1) == substr(b, j, 1))
            d[i, j] = least(d[i, j], d[i - 2, j - 2] + 1)
        }
      return d[length(a), length(b)]
    }
    BEGIN {
      split(known, k); split(names, n)
      for (i in k) is_known[k[i]] = 1
      for (i in n) {
        if (n[i] in is_known || length(n[i]) < 5 || n[i] !~ /^[A-Z][A-Z0-9_]*$/) continue
        for (j in k) {
          # a typing mistake keeps the first letter; one more S or digit is another name
          if (length(k[j]) < 5 || substr(n[i], 1, 1) != substr(k[j], 1, 1)) continue
          if (index(n[i], k[j]) == 1 && n[i] ~ /[S0-9]$/) continue
          if (length(n[i]) - length(k[j]) < 2 && distance(n[i], k[j]) == 1) {
            printf "error: %s is no variable of this launcher (did you mean %s?): correct it, or unset %s\n",
              n[i], k[j], n[i] > "/dev/stderr"
            exit 2
          }
        }
      }
    }'
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  usage
  exit 0
fi

# shellcheck disable=SC2046  # one name a word
check_names $(compgen -e)
for name in MODEL DATA SAVE TRAIN_ITERS; do
  [[ -n ${!name:-} ]] || fail "$name is not set; launch/pretrain_gpt_tsft.sh --help says what it is"
done

# ---- where it runs
if [[ -z ${DEVICE:-} ]]; then
  if nvidia-smi -L >/dev/null 2>&1; then DEVICE=cuda; else DEVICE=cpu; fi
fi
[[ $DEVICE == cuda || $DEVICE == cpu ]] || fail "DEVICE=$DEVICE: cuda or cpu"
PRESET_ARGS=() ASKED_GRAD_REDUCE=${GRAD_REDUCE:-}
if [[ -n ${PRESET:-} ]]; then
  names=$(cd "$PRESETS" && printf '%s\n' *.sh | sed 's/\.sh$//')
  grep -qxF -e "$PRESET" <<<"$names" || fail "PRESET=$PRESET: one of ${names//$'\n'/, }"
  [[ $DEVICE == cuda ]] || fail "PRESET=$PRESET is for GPUs: leave it out with DEVICE=$DEVICE"
  # shellcheck source=/dev/null  # data: variables that the user left open, and PRESET_ARGS
  source "$PRESETS/$PRESET.sh"
fi
if [[ -z ${PYTHON:-} ]]; then
  PYTHON="$REPOSITORY/.venv/bin/python"
  [[ -x $PYTHON ]] || PYTHON=python3
fi

TP=${TP:-1} PP=${PP:-1} CP=${CP:-1} MBS=${MBS:-1} GBS=${GBS:-32} SEQ_LENGTH=${SEQ_LENGTH:-4096}
NUM_NODES=${NUM_NODES:-1}
for name in TP PP CP MBS GBS SEQ_LENGTH NUM_NODES TRAIN_ITERS; do whole_number "$name" 1; done
if [[ -z ${GPUS_PER_NODE:-} ]]; then
  if [[ $DEVICE == cuda ]]; then
    if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
      GPUS_PER_NODE=$(awk -F, '{ print NF }' <<<"$CUDA_VISIBLE_DEVICES")
    else
      GPUS_PER_NODE=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
    fi
    [[ $GPUS_PER_NODE -ge 1 ]] || fail "nvidia-smi lists no GPU: set GPUS_PER_NODE, or DEVICE=cpu"
  else
    GPUS_PER_NODE=$(((TP * PP * CP + NUM_NODES - 1) / NUM_NODES))
  fi
fi
whole_number GPUS_PER_NODE 1
WORLD=$((GPUS_PER_NODE * NUM_NODES))
[[ $((WORLD % (TP * PP * CP))) -eq 0 ]] ||
  fail "$WORLD processes are not a multiple of TP*PP*CP = $TP*$PP*$CP = $((TP * PP * CP))"
DP=$((WORLD / (TP * PP * CP)))
[[ $((GBS % (MBS * DP))) -eq 0 ]] || fail "GBS=$GBS is not a multiple of MBS * data parallel = $MBS * $DP"

DISTRIBUTED_ARGS=(--nproc-per-node "$GPUS_PER_NODE")
if [[ $NUM_NODES -gt 1 ]]; then
  [[ -n ${MASTER_ADDR:-} ]] || fail "MASTER_ADDR is not set: with NUM_NODES=$NUM_NODES it names the node of rank 0"
  [[ -n ${NODE_RANK:-} ]] || fail "NODE_RANK is not set: with NUM_NODES=$NUM_NODES it is 0 to $((NUM_NODES - 1))"
  whole_number NODE_RANK 0
  [[ $NODE_RANK -lt $NUM_NODES ]] || fail "NODE_RANK=$NODE_RANK, but NUM_NODES=$NUM_NODES"
  DISTRIBUTED_ARGS+=(--nnodes "$NUM_NODES" --node-rank "$NODE_RANK")
  DISTRIBUTED_ARGS+=(--master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-6000}")
elif [[ -n ${MASTER_PORT:-} ]]; then
  DISTRIBUTED_ARGS+=(--master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "$MASTER_PORT")
else
  # a rendezvous on a free port; the address is given so that a host name nobody can resolve does no harm
  DISTRIBUTED_ARGS+=(--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1)
fi

# ---- what is trained, and toward which target
MODEL_ARGS=(--tsft-model "$MODEL" --tsft-device "$DEVICE")

data=("$DATA") # one folder, whatever its name
[[ $DATA != *:* ]] || read -r -a data <<<"$DATA"
[[ -z ${OBJECTIVE:-} ]] || MODEL_ARGS+=(--tsft-objective "$OBJECTIVE")
read -r -a objective_args <<<"${OBJECTIVE_ARGS:-}"
[[ ${#objective_args[@]} -eq 0 ]] || MODEL_ARGS+=(--tsft-args "${objective_args[@]}")
[[ -z ${TEACHER:-} ]] || MODEL_ARGS+=(--tsft-teacher "$TEACHER")
[[ -z ${TEACHER_LOAD:-} ]] || MODEL_ARGS+=(--tsft-teacher-load "$TEACHER_LOAD")
read -r -a caches <<<"${TEACHER_CACHE:-}"
[[ ${#caches[@]} -eq 0 ]] || MODEL_ARGS+=(--tsft-teacher-cache "${caches[@]}")

DATA_ARGS=(--tsft-data "${data[@]}" --seq-length "$SEQ_LENGTH" --seed "${SEED:-1234}")
[[ -z ${EVAL_DATA:-} ]] || DATA_ARGS+=(--tsft-eval-data "$EVAL_DATA")

# ---- how
LR=${LR:-1e-5}
TRAINING_ARGS=(
  --micro-batch-size "$MBS"
  --global-batch-size "$GBS"
  --train-iters "$TRAIN_ITERS"
  --lr "$LR"
  --min-lr "${MIN_LR:-$(awk -v lr="$LR" 'BEGIN { print lr / 10 }')}"
  --lr-decay-style "${LR_DECAY_STYLE:-cosine}"
  --lr-warmup-iters "${WARMUP_ITERS:-0}"
  --weight-decay "${WEIGHT_DECAY:-0}"
  --clip-grad "${CLIP_GRAD:-1.0}"
  --adam-beta1 "${ADAM_BETA1:-0.9}"
  --adam-beta2 "${ADAM_BETA2:-0.95}"
)

DTYPE=${DTYPE:-$([[ $DEVICE == cuda ]] && echo bf16 || echo fp32)}
case $DTYPE in
  bf16 | fp16) DTYPE_ARGS=("--$DTYPE") ;;
  fp32) DTYPE_ARGS=() ;;
  *) fail "DTYPE=$DTYPE: bf16, fp16 or fp32 (FP8 is bf16 with a PRESET, or with Megatron's --fp8-* flags)" ;;
esac
case ${GRAD_REDUCE:-fp32} in
  bf16)
    if [[ $DTYPE == bf16 ]]; then
      DTYPE_ARGS+=(--grad-reduce-in-bf16)
    elif [[ -n $ASKED_GRAD_REDUCE ]]; then # a preset's is for bf16 alone
      fail "GRAD_REDUCE=bf16 goes with DTYPE=bf16, which is $DTYPE: leave GRAD_REDUCE out"
    fi
    ;;
  fp32) ;;
  *) fail "GRAD_REDUCE=$GRAD_REDUCE: fp32 or bf16" ;;
esac

MODEL_PARALLEL_ARGS=(
  --tensor-model-parallel-size "$TP"
  --pipeline-model-parallel-size "$PP"
  --context-parallel-size "$CP"
)
[[ $DEVICE == cpu ]] || MODEL_PARALLEL_ARGS+=(--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather)
if [[ ${SEQUENCE_PARALLEL:-$([[ $DEVICE == cuda && $TP -gt 1 ]] && echo 1 || echo 0)} == 1 ]]; then
  MODEL_PARALLEL_ARGS+=(--sequence-parallel)
fi

EVAL_AND_LOGGING_ARGS=(
  --log-interval "${LOG_INTERVAL:-1}"
  --save "$SAVE"
  --save-interval "${SAVE_INTERVAL:-200}"
  --tensorboard-dir "$SAVE/tensorboard"
)
[[ -z ${EVAL_INTERVAL:-} ]] || EVAL_AND_LOGGING_ARGS+=(--eval-interval "$EVAL_INTERVAL")

# ---- go
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}  # Megatron overlaps by the order of its kernels
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
  OMP_NUM_THREADS=1
  if [[ $DEVICE == cpu ]]; then
    cores=$(nproc)
    OMP_NUM_THREADS=$((cores > GPUS_PER_NODE ? cores / GPUS_PER_NODE : 1))
  fi
fi
export OMP_NUM_THREADS

COMMAND=(
  "$PYTHON" -m megatron_tsft.commands.torchrun "${DISTRIBUTED_ARGS[@]}"
  -m megatron_tsft.training.pretrain_gpt
  "${MODEL_ARGS[@]}" "${DATA_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DTYPE_ARGS[@]}" "${PRESET_ARGS[@]}"
  "${MODEL_PARALLEL_ARGS[@]}" "${EVAL_AND_LOGGING_ARGS[@]}" "$@"
)
if [[ ${DRY_RUN:-0} == 1 ]]; then
  printf '%q ' "${COMMAND[@]}"
  echo
  exit 0
fi
exec "${COMMAND[@]}"
