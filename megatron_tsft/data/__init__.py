"""Chat -> tokens, the prepared dataset, packing, micro-batches."""
