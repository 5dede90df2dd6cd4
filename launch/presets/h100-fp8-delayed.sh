# H100 and H200: FP8, scales from the largest values of 1024 past steps; needs Transformer Engine
DTYPE=${DTYPE:-bf16}
GRAD_REDUCE=${GRAD_REDUCE:-bf16}
PRESET_ARGS=(
  --fp8-format hybrid
  --fp8-recipe delayed
  --fp8-amax-history-len 1024
  --fp8-amax-compute-algo max
  --attention-backend fused
  --manual-gc --manual-gc-interval 100
  --distributed-timeout-minutes 60
)
