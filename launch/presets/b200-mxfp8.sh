# B200 and GB200: MXFP8, a scale for every 32 values; needs Transformer Engine
DTYPE=${DTYPE:-bf16}
GRAD_REDUCE=${GRAD_REDUCE:-bf16}
PRESET_ARGS=(
  --fp8-format e4m3
  --fp8-recipe mxfp8
  --attention-backend fused
  --manual-gc --manual-gc-interval 100
  --distributed-timeout-minutes 60
)
