"""Triton kernels of the loss: one forward, one backward, and what launches them."""
