# A100: bf16; layers of Transformer Engine or local ones, Transformer Engine chooses its attention
DTYPE=${DTYPE:-bf16}
GRAD_REDUCE=${GRAD_REDUCE:-bf16}
PRESET_ARGS=(
  --manual-gc --manual-gc-interval 100
  --distributed-timeout-minutes 60
)
