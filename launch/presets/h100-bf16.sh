# H100 and H200: bf16; layers of Transformer Engine or local ones
DTYPE=${DTYPE:-bf16}
GRAD_REDUCE=${GRAD_REDUCE:-bf16}
PRESET_ARGS=(
  --attention-backend fused
  --manual-gc --manual-gc-interval 100
  --distributed-timeout-minutes 60
)
