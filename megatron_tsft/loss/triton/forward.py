"""The forward kernel: a program reads one token's columns once and leaves their statistics."""

import triton
import triton.language as tl

from megatron_tsft.loss.triton.blocks import (
    FLOOR,
    exponent,
    first_id,
    is_bad,
    load_logits,
    load_teacher,
    top_k_block,
)


@triton.jit
def forward_kernel(
    logits,  # [N, width]
    row_stride,
    column_stride,
    columns,  # real ones
    scale,
    active,  # [N] bool
    label,  # [N] int64, -1: elsewhere
    a,  # pi's exponents: [N] or, at stride 0, one for all
    a_stride,
    b,
    b_stride,
    teacher,  # [N, width], or None: no dense teacher
    teacher_row_stride,
    teacher_column_stride,
    ids,  # [N, k] int64 ascending columns of this shard, or None: no top-k teacher
    logprobs,  # [N, k]
    tail,  # [N]
    k,
    # the statistics, [N] each (statistics.py names them); what is None is not computed
    m_out,
    s_out,
    z_y_out,
    e_out,
    c_out,
    m_pi_out,
    s_pi_out,
    d_pi_out,
    k_pi_out,
    m_t_out,
    s_t_out,
    t_y_out,
    bad_out,
    K_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Online: a block is merged into what came before it as statistics.combine merges shards."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(active + row):
        logits += row * row_stride
        y = tl.load(label + row)
        z_y = tl.load(logits + y * column_stride, mask=y >= 0, other=0.0).to(tl.float32)
        tl.store(
            z_y_out + row, tl.where(y >= 0, tl.where(z_y * scale < FLOOR, FLOOR, z_y * scale), 0.0)
        )
        if teacher is not None:
            teacher += row * teacher_row_stride
            if t_y_out is not None:
                t_y = tl.load(teacher + y * teacher_column_stride, mask=y >= 0, other=0.0).to(
                    tl.float32
                )
                tl.store(t_y_out + row, tl.where(t_y < FLOOR, FLOOR, t_y))
        a_row, b_row, tail_row, j = 0.0, 0.0, 0.0, 0
        if s_pi_out is not None:
            a_row, b_row = tl.load(a + row * a_stride), tl.load(b + row * b_stride)
            if ids is not None:
                ids += row * k
                logprobs += row * k
                tail_row = tl.load(tail + row)
                j = first_id(ids, k, K_BLOCK)

        m, s, e, c, m_t, s_t, bad = FLOOR + 0.0, 0.0, 0.0, 0.0, FLOOR + 0.0, 0.0, 0.0
        m_pi, s_pi, d_pi, k_pi = FLOOR + 0.0, 0.0, 0.0, 0.0
        for start in range(0, columns, BLOCK):
            cols = start + tl.arange(0, BLOCK).to(tl.int64)
            z = load_logits(logits, column_stride, cols, columns, scale)
            m_new = tl.maximum(m, tl.max(z))
            by = m - m_new  # what came before moves by this
            x = tl.where(cols < columns, z - m_new, FLOOR)
            e_x = tl.exp(x)
            factor = tl.exp(by)
            if e_out is not None:
                e = (e + s * by) * factor + tl.sum(e_x * x)
            if c_out is not None:
                c = c * factor * factor + tl.sum(e_x * e_x)
            s = s * factor + tl.sum(e_x)
            m = m_new

            log_t, moved = None, a_row * by
            if teacher is not None:
                t = load_teacher(teacher, teacher_column_stride, cols, columns)
                bad += tl.sum(is_bad(t).to(tl.float32))  # type: ignore[operator]
                t = tl.where(is_bad(t), float("-inf"), t)
                m_t_new = tl.maximum(m_t, tl.max(t))
                by_t = m_t - m_t_new
                log_t = t - m_t_new
                moved += b_row * by_t
                if s_t_out is not None:
                    s_t = s_t * tl.exp(by_t) + tl.sum(tl.exp(log_t))
                m_t = m_t_new
            if s_pi_out is not None:
                if ids is not None:
                    log_t, j = top_k_block(tail_row, cols, start + BLOCK, j, ids, logprobs, k)
                u = exponent(a_row, x, b_row, log_t, cols, columns)
                m_pi = tl.where(s_pi > 0, m_pi + moved, FLOOR)
                m_pi_new = tl.maximum(m_pi, tl.max(u))
                by_pi = m_pi - m_pi_new
                u -= m_pi_new
                w = tl.exp(u)
                factor_pi = tl.exp(by_pi)
                if k_pi_out is not None:
                    k_pi = (k_pi + s_pi * by_pi) * factor_pi + tl.sum(w * u)
                d_pi = (d_pi + s_pi * by) * factor_pi + tl.sum(w * x)
                s_pi = s_pi * factor_pi + tl.sum(w)
                m_pi = m_pi_new

        tl.store(m_out + row, m)
        tl.store(s_out + row, s)
        if e_out is not None:
            tl.store(e_out + row, e)
        if c_out is not None:
            tl.store(c_out + row, c)
        if m_t_out is not None:
            tl.store(m_t_out + row, m_t)
            tl.store(bad_out + row, bad)
        if s_t_out is not None:
            tl.store(s_t_out + row, s_t)
        if s_pi_out is not None:
            tl.store(m_pi_out + row, m_pi)
            tl.store(s_pi_out + row, s_pi)
            tl.store(d_pi_out + row, d_pi)
        if k_pi_out is not None:
            tl.store(k_pi_out + row, k_pi)
