# H100 and H200: FP8, a scale for every 128 values (DeepSeek-V3's way); needs Transformer Engine and CUDA 12.9
DTYPE=${DTYPE:-bf16}
GRAD_REDUCE=${GRAD_REDUCE:-bf16}
PRESET_ARGS=(
  --fp8-format e4m3
  --fp8-recipe blockwise
  --attention-backend fused
  --manual-gc --manual-gc-interval 100
  --distributed-timeout-minutes 60
)
