"""The indexer's loss over a selection: one query at a time, its heads as the rows of each product.

With C_t the classes (keys, or pools of ``KPOOL`` keys) that query t selected and sees, slots of ``indices [B, T, J]``:

    lse_th = log sum_s exp(scale q_th . k_s)                            s in a class of C_t, or in the visible tail pool
    P_tc   = sum_h sum_{s in c} exp(scale q_th . k_s - lse_th)          p_tc = P_tc / N_t,  N_t = sum_c P_tc
    I_tc   = sum_j w_tj ReLU(q_idx_tj . k_idx_c)                        lse_I_t = log sum_c exp(I_tc)
    KL_t   = sum_c p_tc (log p_tc - I_tc) + lse_I_t
    ds_tc  = exp(I_tc - lse_I_t) - p_tc

    x_tjc  = q_idx_tj . k_idx_c        g_tjc = ds_tc where x_tjc > 0, else 0
    dw_tj  = sum_c g_tjc x_tjc         dq_tj = w_tj sum_c g_tjc k_idx_c         dk_c += sum_j g_tjc w_tj q_idx_tj

Forward:   `sparse_lse_kernel`, where the attention has not left its lse -> for each chunk of rows:
           `sparse_target_kernel` (P of each group of heads into a workspace [rows, groups, J])
           -> `sparse_compare_kernel` (the row's loss, NOTE [Five sums] in loss_dense.py, and ds)
Backward:  `sparse_gradient_kernel`

A group is at most 64 heads that share a key head: one tile of rows, which stays in place while selected keys pass by.
The keys of the attention are the wide ones, and fetched once; so ds is kept, as long as the selection itself.

Rows of k_idx are shared by queries in no known order: dk is added up by float32 atomics, and its last bits differ from
run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .loss_dense import kl_of_sums
from .loss_tiles import LN_2, LOG2_E, finite_or_zero, load_parts, products

# Slots that a row's program turns from scores into ds at once: 8 a thread, where products take 64.
SWEEP = tl.constexpr(1024)


@triton.jit
def selected_classes(p_indices, p_first, p_last, i_t, slot, J):
    """Return the classes in slots of a row of ``indices``, 0 where none, and which there are: selected and visible."""
    c = tl.load(p_indices + slot, mask=slot < J, other=-1).to(tl.int32)
    allowed = (c >= tl.load(p_first + i_t)) & (c < tl.load(p_last + i_t))
    return tl.where(allowed, c, 0), allowed


@triton.jit(do_not_specialize=["T", "S", "J", "query_start"])
def sparse_lse_kernel(
    p_q, p_k, p_indices, p_first, p_last, p_first_class, p_last_class, p_lse, scale_log2, query_start, T, S, J,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DM: tl.constexpr, DR: tl.constexpr, KPOOL: tl.constexpr,
    BH: tl.constexpr, BS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the log-sum-exp of BH heads of one query, which share a key head, over the tokens it attends to."""
    G: tl.constexpr = H // HKV
    TILES: tl.constexpr = (G + BH - 1) // BH
    i_t, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    i_hk, i_g = tl.program_id(1) // TILES, tl.program_id(1) % TILES * BH + tl.arange(0, BH)
    m_h, i_h, o_s = i_g < G, i_hk * G + i_g, tl.arange(0, BS)
    row = i_b * T + i_t
    b_q, b_q_rest = load_parts(p_q + row * (H * D) + i_h * D, m_h, D, DM, DR)
    p_k += i_b * S * (HKV * D) + i_hk * D
    p_indices += row * J
    length = query_start + i_t + 1
    # The tail lies behind every pool that the query sees, and is less than a pool long.
    tail_start, tail_stop = length // KPOOL * KPOOL, tl.minimum(length, tl.load(p_last + i_t))
    b_max = tl.full((BH,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BH,), dtype=tl.float32)
    num_selected = (J + BS - 1) // BS * KPOOL
    for i in tl.range(num_selected + (KPOOL + BS - 2) // BS, num_stages=STAGES):
        c, m_s = selected_classes(p_indices, p_first_class, p_last_class, i_t, i // KPOOL * BS + o_s, J)
        s = c * KPOOL + i % KPOOL
        if KPOOL > 1:
            tail = tail_start + (i - num_selected) * BS + o_s
            m_s = tl.where(i < num_selected, m_s, tail < tail_stop)
            s = tl.where(i < num_selected, s, tail)
        b_k, b_k_rest = load_parts(p_k + s.to(tl.int64) * (HKV * D), m_s, D, DM, DR)
        b_x = products(b_q, b_q_rest, b_k, b_k_rest, DR, PRECISION) * scale_log2
        b_x = tl.where(m_s[None, :], b_x, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_x, 1))
        base = finite_or_zero(b_new)
        b_sum = b_sum * tl.exp2(b_max - base) + tl.sum(tl.exp2(b_x - base[:, None]), 1)
        b_max = b_new
    b_lse = tl.where(b_sum > 0.0, (b_max + tl.log2(b_sum)) * LN_2, float("-inf"))
    tl.store(p_lse + row * H + i_h, b_lse, mask=m_h)


@triton.jit
def load_index_heads(p_q, p_w, i_group, HI: tl.constexpr, DI: tl.constexpr, BD: tl.constexpr, BHI: tl.constexpr):
    """Load q_idx and w of BHI indexer heads of a query, zeros beyond the heads."""
    i_h, i_d = i_group * BHI + tl.arange(0, BHI), tl.arange(0, BD)
    m_h = i_h < HI
    b_q = tl.load(p_q + i_h[:, None] * DI + i_d[None, :], mask=m_h[:, None] & (i_d < DI)[None, :], other=0.0)
    return b_q, tl.load(p_w + i_h, mask=m_h, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["b0", "start", "T", "S", "J"])
def sparse_target_kernel(
    p_q, p_k, p_lse, p_indices, p_first, p_last, p_P, scale_log2, b0, start, T, S, J, H: tl.constexpr,
    HKV: tl.constexpr, D: tl.constexpr, DM: tl.constexpr, DR: tl.constexpr, KPOOL: tl.constexpr, BH: tl.constexpr,
    BS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum the probabilities of one group of heads of a query: ``p_P [NB, rows, groups, J]``."""
    G: tl.constexpr = H // HKV
    TILES: tl.constexpr = (G + BH - 1) // BH
    i_group, i_n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_t, i_b = start + tl.program_id(0), b0 + i_n
    i_hk, i_g, o_s = i_group // TILES, i_group % TILES * BH + tl.arange(0, BH), tl.arange(0, BS)
    m_h, i_h = i_g < G, i_hk * G + i_g
    row = i_b * T + i_t
    b_q, b_q_rest = load_parts(p_q + row * (H * D) + i_h * D, m_h, D, DM, DR)
    # Rows beyond the heads get probabilities of zero.
    b_lse = tl.load(p_lse + row * H + i_h, mask=m_h, other=float("inf")) * LOG2_E
    p_k += (i_b * S * HKV + i_hk) * D
    p_indices += row * J
    p_P += ((i_n * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + i_group) * J
    b_P = tl.zeros((BS,), dtype=tl.float32)
    # One loop over tiles of slots and the tokens of their pools, so that loads run ahead across both.
    for i in tl.range((J + BS - 1) // BS * KPOOL, num_stages=STAGES):
        slot, i_inside = i // KPOOL * BS + o_s, i % KPOOL + 0 * o_s
        c, allowed = selected_classes(p_indices, p_first, p_last, i_t, slot, J)
        s = c * KPOOL + i_inside
        b_k, b_k_rest = load_parts(p_k + s.to(tl.int64) * (HKV * D), allowed, D, DM, DR)
        b_x = products(b_q, b_q_rest, b_k, b_k_rest, DR, PRECISION)
        b_P = tl.where(i_inside > 0, b_P, 0.0) + tl.sum(tl.exp2(b_x * scale_log2 - b_lse[:, None]), 0)
        tl.store(p_P + slot, tl.where(allowed, b_P, 0.0), mask=(slot < J) & (i_inside == KPOOL - 1))


@triton.jit
def total(b):
    """Sum a vector to ``[1]``.

    Triton 3.6 and 3.7 fail for compute capability 10.0 where column sums of a product are summed to a scalar.
    """
    return tl.sum(b[None, :], 1)


@triton.jit
def load_target(p_P, slot, J, GROUPS: tl.constexpr):
    """Sum P of the groups of heads in slots of one row."""
    b_P = tl.load(p_P + slot, mask=slot < J, other=0.0)
    for i_group in range(1, GROUPS):
        b_P += tl.load(p_P + i_group * J + slot, mask=slot < J, other=0.0)
    return b_P


@triton.jit(do_not_specialize=["b0", "start", "T", "P", "J"])
def sparse_compare_kernel(
    p_q_idx, p_k_idx, p_w, p_P, p_indices, p_first, p_last, p_kl, p_ds, b0, start, T, P, J, HI: tl.constexpr,
    DI: tl.constexpr, BD: tl.constexpr, GROUPS: tl.constexpr, BHI: tl.constexpr, BS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compare both distributions of one query over its selection: its loss ``p_kl [B, T]`` and ``p_ds [B, T, J]``."""
    INDEX_TILES: tl.constexpr = (HI + BHI - 1) // BHI
    i_t, i_b = start + tl.program_id(0), b0 + tl.program_id(1).to(tl.int64)
    o_s, i_d = tl.arange(0, BS), tl.arange(0, BD)
    row = i_b * T + i_t
    i_row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    p_q_idx += row * (HI * DI)
    p_w += row * HI
    p_k_idx += i_b * P * DI
    p_indices += row * J
    p_ds += row * J
    p_P += i_row * GROUPS * J
    # What fits one tile of rows is loaded once.
    if INDEX_TILES == 1:
        b_q, b_w = load_index_heads(p_q_idx, p_w, 0, HI, DI, BD, BHI)
    largest = tl.full((1,), float("-inf"), dtype=tl.float32)
    L = tl.zeros((1,), dtype=tl.float32)
    N = tl.zeros((1,), dtype=tl.float32)
    A = tl.zeros((1,), dtype=tl.float32)
    X = tl.zeros((1,), dtype=tl.float32)
    for i_s in tl.range(0, J, BS, num_stages=STAGES):
        slot = i_s + o_s
        c, allowed = selected_classes(p_indices, p_first, p_last, i_t, slot, J)
        m_k = allowed[:, None] & (i_d < DI)[None, :]
        b_k = tl.load(p_k_idx + c.to(tl.int64)[:, None] * DI + i_d[None, :], mask=m_k, other=0.0)
        b_I = tl.zeros((BS,), dtype=tl.float32)
        if INDEX_TILES == 1:
            b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            b_I += tl.sum(tl.maximum(b_x, 0.0) * b_w[:, None], 0)
        else:
            for i_tile in range(INDEX_TILES):
                b_q, b_w = load_index_heads(p_q_idx, p_w, i_tile, HI, DI, BD, BHI)
                b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
                b_I += tl.sum(tl.maximum(b_x, 0.0) * b_w[:, None], 0)
        b_I = tl.where(allowed, b_I * LOG2_E, float("-inf"))
        tl.store(p_ds + slot, b_I, mask=slot < J)  # of which ds is made when the row has ended
        b_P = load_target(p_P, slot, J, GROUPS)
        larger = tl.maximum(largest, tl.max(b_I[None, :], 1))
        base = finite_or_zero(larger)
        b_I = tl.where(allowed, b_I - base, 0.0)
        L = L * tl.exp2(largest - base) + total(tl.where(allowed, tl.exp2(b_I), 0.0))
        X += N * (finite_or_zero(largest) - base) + total(b_P * b_I)
        N += total(b_P)
        A += total(b_P * tl.log2(tl.where(b_P > 0.0, b_P, 1.0)))
        largest = larger
    kl, _, _ = kl_of_sums(largest, L, N, A, X)
    tl.store(p_kl + row + tl.arange(0, 1), kl)
    # Without a class, or with all attention in the tail, the sums are zero, and so is what they divide.
    base, L, N = finite_or_zero(largest), tl.where(L > 0.0, L, 1.0), tl.where(N > 0.0, N, 1.0)
    tl.debug_barrier()  # all scores have been stored
    for i_s in range(0, J, SWEEP):
        slot = i_s + tl.arange(0, SWEEP)
        b_I = tl.load(p_ds + slot, mask=slot < J, other=float("-inf"))
        b_p = load_target(p_P, slot, J, GROUPS) / N
        tl.store(p_ds + slot, tl.exp2(b_I - base) / L - b_p, mask=slot < J)


@triton.jit(do_not_specialize=["T", "P", "J"])
def sparse_gradient_kernel(
    p_grad, p_ds, p_q_idx, p_k_idx, p_w, p_w_scaled, p_indices, p_first, p_last, p_dq, p_dk, p_dw, factor, T, P, J,
    HI: tl.constexpr, DI: tl.constexpr, BD: tl.constexpr, BHI: tl.constexpr, BS: tl.constexpr, DS_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write dq and dw of BHI indexer heads of one query, and add what they give to ``DS_SCALE * dk [B, P, DI]``.

    ``factor`` times the gradient scales dq and dw; the caller scales dk.  NOTE [Scaled ds] in loss_dense_backward.py.
    """
    i_t, i_group, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_s, i_d = tl.arange(0, BS), tl.arange(0, BD)
    i_h, m_d = i_group * BHI + tl.arange(0, BHI), (i_d < DI)[None, :]
    row = i_b * T + i_t
    b_q, b_w = load_index_heads(p_q_idx + row * (HI * DI), p_w_scaled + row * HI, i_group, HI, DI, BD, BHI)
    p_k_idx += i_b * P * DI
    p_dk += i_b * P * DI
    p_indices += row * J
    p_ds += row * J
    DT: tl.constexpr = p_k_idx.dtype.element_ty
    b_dq = tl.zeros((BHI, BD), dtype=tl.float32)
    b_dw = tl.zeros((BHI,), dtype=tl.float32)
    for i_s in tl.range(0, J, BS, num_stages=STAGES):
        c, allowed = selected_classes(p_indices, p_first, p_last, i_t, i_s + o_s, J)
        o_k = c.to(tl.int64)[:, None] * DI + i_d[None, :]
        m_k = allowed[:, None] & m_d
        b_k = tl.load(p_k_idx + o_k, mask=m_k, other=0.0)
        b_ds = tl.load(p_ds + i_s + o_s, mask=i_s + o_s < J, other=0.0) * DS_SCALE
        b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_g = tl.where(b_x > 0.0, b_ds[None, :], 0.0)
        b_dw += tl.sum(b_g * b_x, 1)
        b_dq = tl.dot(b_g.to(DT), b_k, b_dq, input_precision=PRECISION)
        b_dk = tl.dot(tl.trans((b_g * b_w[:, None]).to(DT)), b_q, input_precision=PRECISION)
        tl.atomic_add(p_dk + o_k, b_dk, mask=m_k, sem="relaxed")
    scale = tl.load(p_grad).to(tl.float32) * factor
    m_h, o_w = i_h < HI, row * HI + i_h
    b_w = tl.load(p_w + o_w, mask=m_h, other=0.0).to(tl.float32)
    b_dq *= (b_w * scale)[:, None]
    p_dq += row * (HI * DI) + i_h[:, None] * DI + i_d[None, :]
    tl.store(p_dq, b_dq.to(p_dq.dtype.element_ty), mask=m_h[:, None] & m_d)
    tl.store(p_dw + o_w, (b_dw * scale).to(p_dw.dtype.element_ty), mask=m_h)
