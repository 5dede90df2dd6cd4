"""What both kernels read: a block of the student's logits, of the teacher, and pi's exponent."""

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1e30)  # megatron_tsft.loss.teacher.FLOOR: finite, and e^FLOOR is 0


@triton.jit
def load_logits(row, stride, cols, columns, scale):
    """z of a block in fp32, FLOOR for -inf and beyond the last real column."""
    z = tl.load(row + cols * stride, mask=cols < columns, other=float("-inf")).to(tl.float32)
    z = tl.where(cols < columns, z * scale, FLOOR)
    return tl.where(z < FLOOR, FLOOR, z)  # a NaN stays


@triton.jit
def load_teacher(row, stride, cols, columns):
    """A dense teacher's values of a block in fp32, -inf beyond the last real column."""
    return tl.load(row + cols * stride, mask=cols < columns, other=float("-inf")).to(tl.float32)


@triton.jit
def is_bad(t):
    """NaN or +inf, which no teacher's row may hold."""
    return (t != t) | (t == float("inf"))


@triton.jit
def first_id(ids, k, K_BLOCK: tl.constexpr):
    """Where in a row's ascending ids those of this shard begin."""
    order = tl.arange(0, K_BLOCK)
    return tl.sum((tl.load(ids + order, mask=order < k, other=0) < 0).to(tl.int32))


@triton.jit
def top_k_block(tail, cols, stop, j, ids, logprobs, k):
    """log T of the columns before `stop` (the end of `cols`): the tail's value, with the top-k
    written over it.

    ids ascend and `j` is the first one not written yet, so a row's blocks together walk the list
    once.
    """
    t = tl.zeros_like(cols).to(tl.float32) + tail
    more = j < k
    while more:
        column = tl.load(ids + j)
        more = column < stop
        if more:
            t = tl.where(cols == column, tl.load(logprobs + j), t)
            j += 1
            more = j < k
    return t, j


@triton.jit
def exponent(a, x, b, log_t, cols, columns):
    """u = a (z - m) + b (log T - m_t), with 0 * anything = 0; below FLOOR beyond the last real
    column.

    `log_t` is None without a teacher.
    """
    u = tl.where(a == 0, 0.0, a * x)
    if log_t is not None:
        log_t = tl.where(log_t < FLOOR, FLOOR, log_t)
        u += tl.where(b == 0, 0.0, b * log_t)
    return tl.where(cols < columns, tl.where(u < FLOOR, FLOOR, u), 2 * FLOOR)
