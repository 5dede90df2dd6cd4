"""The backward kernel: one program a token reads its columns once and writes their gradient."""

import triton
import triton.language as tl

from megatron_tsft.loss.triton.blocks import (
    exponent,
    first_id,
    is_bad,
    load_logits,
    load_teacher,
    top_k_block,
)


@triton.jit
def backward_kernel(
    logits,  # [N, width]
    row_stride,
    column_stride,
    width,
    columns,  # real ones; the others' gradient is zero
    scale,
    label,  # [N] int64, -1: elsewhere
    # GradientWeights (shard.py), [N] each
    active,
    m,
    p,
    at_label,
    m_pi,  # None: no pi
    pi,
    m_t,  # None: no dense teacher
    a,  # pi's exponents: [N] or, at stride 0, one for all
    a_stride,
    b,
    b_stride,
    teacher,  # [N, width]
    teacher_row_stride,
    teacher_column_stride,
    ids,  # [N, k] int64 ascending columns of this shard, or None: no top-k teacher
    logprobs,  # [N, k]
    tail,  # [N]
    k,
    grad,  # [N, width]; may be the logits themselves
    grad_row_stride,
    grad_column_stride,
    K_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """p e^(z - m) - pi e^(u - m_pi), the label's own value at its column, all in fp32, rounded
    once."""
    row = tl.program_id(0).to(tl.int64)
    grad += row * grad_row_stride
    if tl.load(active + row):
        logits += row * row_stride
        y, y_value = tl.load(label + row), tl.load(at_label + row)
        m_row, p_row = tl.load(m + row), tl.load(p + row)
        a_row, b_row, m_pi_row, pi_row, m_t_row, tail_row, j = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0
        if pi is not None:
            a_row, b_row = tl.load(a + row * a_stride), tl.load(b + row * b_stride)
            m_pi_row, pi_row = tl.load(m_pi + row), tl.load(pi + row)
            if teacher is not None:
                teacher += row * teacher_row_stride
                m_t_row = tl.load(m_t + row)
            if ids is not None:
                ids += row * k
                logprobs += row * k
                tail_row = tl.load(tail + row)
                j = first_id(ids, k, K_BLOCK)
        for start in range(0, width, BLOCK):
            cols = start + tl.arange(0, BLOCK).to(tl.int64)
            x = load_logits(logits, column_stride, cols, columns, scale) - m_row
            g = p_row * tl.exp(x)
            if pi is not None:
                log_t = None
                if teacher is not None:
                    t = load_teacher(teacher, teacher_column_stride, cols, columns)
                    log_t = tl.where(is_bad(t), float("-inf"), t) - m_t_row
                if ids is not None:
                    log_t, j = top_k_block(tail_row, cols, start + BLOCK, j, ids, logprobs, k)
                u = exponent(a_row, x, b_row, log_t, cols, columns)
                g -= pi_row * tl.exp(u - m_pi_row)
            g = tl.where(cols == y, y_value, g)
            g = tl.where(cols < columns, g, 0.0)
            tl.store(
                grad + cols * grad_column_stride, g.to(grad.dtype.element_ty), mask=cols < width
            )
    else:
        for start in range(0, width, BLOCK):
            cols = start + tl.arange(0, BLOCK).to(tl.int64)
            zero = tl.zeros([BLOCK], tl.float32).to(grad.dtype.element_ty)
            tl.store(grad + cols * grad_column_stride, zero, mask=cols < width)
