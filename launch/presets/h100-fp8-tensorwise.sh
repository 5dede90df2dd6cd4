# H100 and H200: FP8, one scale a tensor from its present values, first and last layer in bf16; needs Transformer Engine
DTYPE=${DTYPE:-bf16}
GRAD_REDUCE=${GRAD_REDUCE:-bf16}
PRESET_ARGS=(
  --fp8-format hybrid
  --fp8-recipe tensorwise
  --first-last-layers-bf16 --num-layers-at-start-in-bf16 1 --num-layers-at-end-in-bf16 1
  --attention-backend fused
  --manual-gc --manual-gc-interval 100
  --distributed-timeout-minutes 60
)
