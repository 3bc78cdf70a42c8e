"""Split-KV decoding in Triton: attention of a few new queries over a long cache, every cached byte read once.

Two launches. `split_kernel` cuts each sequence's cache into `num_splits` runs of tiles and leaves, for every run, the
normalized output and the log2 of its softmax sum; `combine_kernel` weighs the runs (flash-decoding, Dao et al. 2023).

All query heads of a key head and all new tokens are rows of one matrix product, row = head * tokens + token, so a key
and the value made from it cross memory once for all of them. A key is read as up to three chunks of columns, each as
wide as a power of two allows:

    VALUE   chunks of the key                    value
    OWN     columns                              chunks of a tensor of its own
    KEY     columns                              the same chunks
    SLICE   the slice, the rest                  the first chunk
    ROTATE  two halves of the rotated part, rest the chunks before rotation

ROTATE turns a tile's keys for the scores and leaves them plain for the values. The rotation at slot t0 + d is R_t0 R_d:
R_d of a tile is a table that stays in registers, R_t0 is one row read per tile; no cosine is read per cached token.

Values outside a sequence are never read: their memory may hold anything.
"""

from __future__ import annotations

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    gdc_launch_dependents = gdc_wait = None

OWN, KEY, SLICE, ROTATE = (tl.constexpr(number) for number in range(4))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _rows(
    start, base, stride_page, stride_slot, table, n, valid, PAGE: tl.constexpr, BLOCK_N: tl.constexpr
):  # pointer of the tile and offsets [BLOCK_N] from it
    if PAGE == 0:
        return base + tl.cast(start, tl.int64) * stride_slot, tl.arange(0, BLOCK_N) * stride_slot
    elif PAGE % BLOCK_N == 0:
        page = tl.load(table + start // PAGE).to(tl.int64)
        return base + page * stride_page + (start % PAGE) * stride_slot, tl.arange(0, BLOCK_N) * stride_slot
    else:
        page = tl.load(table + n // PAGE, mask=valid, other=0).to(tl.int64)
        return base, page * stride_page + (n % PAGE) * stride_slot


@triton.jit
def _load(pointer, rows, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # [BLOCK_N, BLOCK]
    columns = tl.arange(0, BLOCK)
    at = pointer + rows[:, None] + (FIRST + columns)[None, :]
    if WIDTH == BLOCK:
        return tl.load(at, mask=valid[:, None], other=0.0)
    else:
        return tl.load(at, mask=valid[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def _load_query(pointer, rows_at, row_valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    at = pointer + rows_at[:, None] + (FIRST + columns)[None, :]
    return tl.load(at, mask=row_valid[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def _largest(x):  # [BLOCK_R]
    return tl.max(tl.abs(x.to(tl.float32)), 1)


@triton.jit
def _pair(x, unit):  # [2 BLOCK_R, BLOCK]: two e4m3 whose sum is x / unit, exactly where x has bfloat16's 8 bits
    x = x.to(tl.float32) / unit[:, None]
    high = x.to(tl.float8e4nv)
    low = (x - high.to(tl.float32)).to(tl.float8e4nv)
    return tl.reshape(tl.permute(tl.join(high, low), (2, 0, 1)), (2 * x.shape[0], x.shape[1]))


@triton.jit
def _store(pointer, rows_at, row_valid, value, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    at = pointer + rows_at[:, None] + (FIRST + columns)[None, :]
    mask = row_valid[:, None] & (columns < WIDTH)[None, :]
    tl.store(at, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def split_kernel(
    query,
    key,
    value,
    out,  # [B, N, T, V] where there is one split, else float32 [B, G, num_splits, rows, V]
    lse,  # float32: natural log, [B, N, T], where there is one split, else log2, [B, G, num_splits, rows]
    lengths,
    length,
    table,
    mask,
    slopes,
    sinks,
    key_scale,
    value_scale,
    origin,  # float32 [tiles, 2, half]: cos and sin at every tile's first slot
    local,  # float32 [2, BLOCK_N, half]: cos and sin of the slots within a tile
    scale,
    stride_qb,
    stride_qn,
    stride_qt,
    stride_kb,
    stride_kg,
    stride_ks,
    stride_vb,
    stride_vg,
    stride_vs,
    stride_ob,
    stride_on,
    stride_ot,
    stride_lb,
    stride_tb,
    stride_mb,
    stride_mt,
    stride_sb,  # of both scales: batch or page, key head, slot
    stride_sg,
    stride_ss,
    heads,  # query heads of a key head
    tokens,
    groups,
    num_splits,
    window,
    VALUE: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    B0: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    VB0: tl.constexpr,
    VB1: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    DIRECT: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,  # more than one new token
    EARLY: tl.constexpr,  # the combining kernel is launched before this one ends, and waits
    SCALES: tl.constexpr,  # 0: none, 1: per tensor, 2: per token
    CARRIED: tl.constexpr,  # the query is converted
    PAIR: tl.constexpr,  # scores of an e4m3 cache without conversion: the query is the sum of two e4m3
    DOT: tl.constexpr,  # dtype of the product with the values
    SCORE: tl.constexpr,  # dtype of the product with the keys
    TURN: tl.constexpr,  # dtype in which keys are rotated
    PRECISION: tl.constexpr,
):
    split = tl.program_id(0)
    group = tl.program_id(1) % groups
    block = tl.program_id(1) // groups
    batch = tl.program_id(2)
    rows = heads * tokens
    if HAS_LENGTHS:
        length = tl.load(lengths + batch * stride_lb).to(tl.int32)

    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    row_valid = row < rows
    head = row // tokens
    token = row % tokens
    position = length - tokens + token  # slot of each row's query

    # This split's run of tiles.
    first = 0
    if HAS_WINDOW:
        begin = tl.maximum(length - tokens - window + 1, 0)
        first = begin // BLOCK_N * BLOCK_N
    run = tl.cdiv(tl.cdiv(length - first, BLOCK_N), num_splits) * BLOCK_N
    low = first + split * run
    high = tl.minimum(low + run, length)
    if not DIRECT:
        if low >= length:
            lse_at = ((batch * groups + group) * num_splits + split).to(tl.int64) * rows + row
            tl.store(lse + lse_at, tl.full([BLOCK_R], float("-inf"), tl.float32), mask=row_valid)
            return

    total_head = group * heads + head
    q_at = batch.to(tl.int64) * stride_qb + total_head.to(tl.int64) * stride_qn + token * stride_qt
    q0 = _load_query(query, q_at, row_valid, 0, W0, B0)
    if W1 > 0:
        q1 = _load_query(query, q_at, row_valid, W0, W1, B1)
    if W2 > 0:
        q2 = _load_query(query, q_at, row_valid, W0 + W1, W2, B2)
    if PAIR:
        largest_q = tl.maximum(_largest(q0), 1e-30)
        if W1 > 0:
            largest_q = tl.maximum(largest_q, _largest(q1))
        if W2 > 0:
            largest_q = tl.maximum(largest_q, _largest(q2))
        # A power of two, so that the largest element is from 128 to 256 units.
        unit = (largest_q.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) / 128
        q0 = _pair(q0, unit)
        if W1 > 0:
            q1 = _pair(q1, unit)
        if W2 > 0:
            q2 = _pair(q2, unit)
    else:
        q0 = q0.to(SCORE)
        if W1 > 0:
            q1 = q1.to(SCORE)
        if W2 > 0:
            q2 = q2.to(SCORE)
    if HAS_SLOPES:
        slope = tl.load(slopes + total_head, mask=row_valid, other=0.0) * LOG2E

    if PAGE == 0:
        key += batch.to(tl.int64) * stride_kb
        value += batch.to(tl.int64) * stride_vb
        key_scale += batch.to(tl.int64) * stride_sb
        value_scale += batch.to(tl.int64) * stride_sb
    else:
        table += batch.to(tl.int64) * stride_tb
    key += group.to(tl.int64) * stride_kg
    value += group.to(tl.int64) * stride_vg
    key_scale += group.to(tl.int64) * stride_sg
    value_scale += group.to(tl.int64) * stride_sg
    factor = scale * LOG2E
    value_factor = 1.0
    if SCALES == 1:
        factor *= tl.load(key_scale)
        value_factor = tl.load(value_scale)

    if PAIR:
        row_factor = factor * unit[:, None]

    if VALUE == ROTATE:
        pairs = tl.arange(0, B0)
        pair_valid = pairs < W0
        local_at = tl.arange(0, BLOCK_N)[:, None] * W0 + pairs[None, :]
        local_cos = tl.load(local + local_at, mask=pair_valid[None, :], other=0.0).to(TURN)
        local_sin = tl.load(local + BLOCK_N * W0 + local_at, mask=pair_valid[None, :], other=0.0).to(TURN)

    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc0 = tl.zeros([BLOCK_R, VB0], tl.float32)
    if VB1 > 0:
        acc1 = tl.zeros([BLOCK_R, VB1], tl.float32)
    if VALUE == KEY or VALUE == ROTATE:
        if W2 > 0:
            acc2 = tl.zeros([BLOCK_R, B2], tl.float32)

    # A loop of one round. What it carries, products take from shared memory; a converted query that it did not carry
    # would be loaded into registers anew for every tile.
    for _ in range(tl.cdiv(high - low, 1 << 30)):
        for start in range(low, high, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            valid = n < high
            if HAS_WINDOW:
                valid = valid & (n >= begin)
            k_tile, k_rows = _rows(start, key, stride_kb, stride_ks, table, n, valid, PAGE, BLOCK_N)
            k0 = _load(k_tile, k_rows, valid, 0, W0, B0)
            if W1 > 0:
                k1 = _load(k_tile, k_rows, valid, W0, W1, B1)
            if W2 > 0:
                k2 = _load(k_tile, k_rows, valid, W0 + W1, W2, B2)
            if PAIR:
                both = tl.dot(q0, tl.trans(k0))
                if W1 > 0:
                    both = tl.dot(q1, tl.trans(k1), both)
                if W2 > 0:
                    both = tl.dot(q2, tl.trans(k2), both)
                s = tl.sum(tl.reshape(both, (2, BLOCK_R, BLOCK_N)), 0)
                s *= row_factor
            k0 = k0.to(DOT)
            if W1 > 0:
                k1 = k1.to(DOT)
            if W2 > 0:
                k2 = k2.to(DOT)
            if VALUE == ROTATE:
                origin_at = origin + tl.cast(start // BLOCK_N, tl.int64) * 2 * W0 + pairs
                origin_cos = tl.load(origin_at, mask=pair_valid, other=0.0)[None, :]
                origin_sin = tl.load(origin_at + W0, mask=pair_valid, other=0.0)[None, :]
                cos = origin_cos.to(TURN) * local_cos - origin_sin.to(TURN) * local_sin
                sin = origin_sin.to(TURN) * local_cos + origin_cos.to(TURN) * local_sin
                left, right = k0.to(TURN), k1.to(TURN)
                turned0, turned1 = (left * cos - right * sin).to(SCORE), (right * cos + left * sin).to(SCORE)
                s = tl.dot(q0, tl.trans(turned0), input_precision=PRECISION)
                s = tl.dot(q1, tl.trans(turned1), s, input_precision=PRECISION)
            elif not PAIR:
                s = tl.dot(q0, tl.trans(k0.to(SCORE)), input_precision=PRECISION)
                if W1 > 0:
                    s = tl.dot(q1, tl.trans(k1.to(SCORE)), s, input_precision=PRECISION)
            if not PAIR:
                if W2 > 0:
                    s = tl.dot(q2, tl.trans(k2.to(SCORE)), s, input_precision=PRECISION)
                s *= factor
            if SCALES == 2:
                scale_tile, scale_rows = _rows(start, key_scale, stride_sb, stride_ss, table, n, valid, PAGE, BLOCK_N)
                s *= tl.load(scale_tile + scale_rows, mask=valid, other=0.0)[None, :]
            if HAS_SLOPES:
                s += slope[:, None] * (n[None, :] - position[:, None])
            seen = valid[None, :]
            if CAUSAL:
                seen = seen & (n[None, :] <= position[:, None])
            if HAS_WINDOW:
                seen = seen & (n[None, :] > position[:, None] - window)
            if HAS_MASK:
                mask_at = mask + batch.to(tl.int64) * stride_mb + token[:, None] * stride_mt + n[None, :]
                seen = seen & (tl.load(mask_at, mask=row_valid[:, None] & valid[None, :], other=0) != 0)
            if SCALES == 2:
                # Values' scales, 2^exponent times 1 to 2, belong to the weights. With the exponents in the scores, the
                # largest weight is near 1, and none that counts is lost in half precision.
                scale_tile, scale_rows = _rows(start, value_scale, stride_sb, stride_ss, table, n, valid, PAGE, BLOCK_N)
                value_scales = tl.maximum(tl.load(scale_tile + scale_rows, mask=valid, other=1.0), 1e-30)
                bits = value_scales.to(tl.int32, bitcast=True)
                exponent = bits >> 23
                s += (exponent - 127).to(tl.float32)[None, :]
            s = tl.where(seen, s, float("-inf"))

            new_top = tl.maximum(top, tl.max(s, 1))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(s - shift[:, None])
            decay = tl.exp2(top - shift)
            if SCALES == 2:
                total = total * decay + tl.sum(p * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[None, :], 1)
                p *= ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)[None, :]
            else:
                total = total * decay + tl.sum(p, 1)
            top = new_top
            p = p.to(DOT)
            if VALUE == OWN:
                v_tile, v_rows = _rows(start, value, stride_vb, stride_vs, table, n, valid, PAGE, BLOCK_N)
                v0 = _load(v_tile, v_rows, valid, 0, V0, VB0).to(DOT)
                acc0 = tl.dot(p, v0, acc0 * decay[:, None], input_precision=PRECISION)
                if VB1 > 0:
                    v1 = _load(v_tile, v_rows, valid, V0, V1, VB1).to(DOT)
                    acc1 = tl.dot(p, v1, acc1 * decay[:, None], input_precision=PRECISION)
            else:
                acc0 = tl.dot(p, k0, acc0 * decay[:, None], input_precision=PRECISION)
                if VB1 > 0:
                    acc1 = tl.dot(p, k1, acc1 * decay[:, None], input_precision=PRECISION)
                if VALUE == KEY or VALUE == ROTATE:
                    if W2 > 0:
                        acc2 = tl.dot(p, k2, acc2 * decay[:, None], input_precision=PRECISION)
        if CARRIED:
            q0 = tl.zeros_like(q0)
            if W1 > 0:
                q1 = tl.zeros_like(q1)
            if W2 > 0:
                q2 = tl.zeros_like(q2)

    if EARLY:
        gdc_launch_dependents()
    total2 = tl.log2(total) + top  # -inf where nothing was seen
    weight = tl.where(total > 0, value_factor / total, 0.0)
    if DIRECT:
        if HAS_SINKS:
            sink = tl.load(sinks + total_head, mask=row_valid, other=0.0).to(tl.float32) * LOG2E
            highest = tl.maximum(total2, sink)
            highest = tl.where(highest == float("-inf"), 0.0, highest)
            with_sink = highest + tl.log2(tl.exp2(total2 - highest) + tl.exp2(sink - highest))
            weight *= tl.where(total > 0, tl.exp2(total2 - with_sink), 0.0)
            total2 = with_sink
        o_at = batch.to(tl.int64) * stride_ob + total_head.to(tl.int64) * stride_on + token * stride_ot
        lse_at = (batch * groups * heads + total_head).to(tl.int64) * tokens + token
        total2 *= LN2
    else:
        lse_at = ((batch * groups + group) * num_splits + split).to(tl.int64) * rows + row
        if VALUE == KEY or VALUE == ROTATE:
            o_at = lse_at * (W0 + W1 + W2)
        else:
            o_at = lse_at * (V0 + V1)
    tl.store(lse + lse_at, total2, mask=row_valid)
    _store(out, o_at, row_valid, acc0 * weight[:, None], 0, V0, VB0)
    if VB1 > 0:
        _store(out, o_at, row_valid, acc1 * weight[:, None], V0, V1, VB1)
    if VALUE == KEY or VALUE == ROTATE:
        if W2 > 0:
            _store(out, o_at, row_valid, acc2 * weight[:, None], W0 + W1, W2, B2)


@triton.jit
def combine_kernel(
    part,  # float32 [B, G, num_splits, rows, V]
    part_lse,  # float32 [B, G, num_splits, rows], log2
    out,  # [B, N, T, V]
    lse,  # float32 [B, N, T], natural log
    sinks,
    stride_ob,
    stride_on,
    stride_ot,
    heads,
    tokens,
    groups,
    num_splits,
    WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    group = tl.program_id(2) % groups
    batch = tl.program_id(2) // groups
    rows = heads * tokens
    row_valid = row < rows
    head = group * heads + row // tokens
    token = row % tokens

    base = ((batch * groups + group) * num_splits).to(tl.int64) * rows
    column_valid = column < WIDTH
    sink = tl.full([BLOCK_R], float("-inf"), tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=row_valid, other=0.0).to(tl.float32) * LOG2E

    # What this kernel takes is latency: all loads are under way at once. A split that saw nothing wrote nothing, and
    # what lies in its place is not used.
    if BLOCK_R > 1:
        top = sink
        for split in tl.static_range(BLOCK_S):
            there = row_valid & (split < num_splits)
            top = tl.maximum(top, tl.load(part_lse + base + split * rows + row, mask=there, other=float("-inf")))
        shift = tl.where(top == float("-inf"), 0.0, top)
        total = tl.exp2(sink - shift)
        acc = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
        for split in tl.static_range(BLOCK_S):
            there = row_valid & (split < num_splits)
            at = base + split * rows + row
            weight = tl.exp2(tl.load(part_lse + at, mask=there, other=float("-inf")) - shift)
            parts = tl.load(
                part + at[:, None] * WIDTH + column[None, :], mask=there[:, None] & column_valid[None, :], other=0.0
            )
            acc += tl.where((weight > 0)[:, None], parts * weight[:, None], 0.0)
            total += weight
    else:
        # Many splits of one row.
        split = tl.arange(0, BLOCK_S)
        there = split < num_splits
        at = base + split * rows + tl.program_id(0)
        sums = tl.load(part_lse + at, mask=there, other=float("-inf"))
        parts = tl.load(
            part + at[:, None] * WIDTH + column[None, :], mask=there[:, None] & column_valid[None, :], other=0.0
        )
        top = tl.maximum(sink, tl.max(sums, 0))
        shift = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2(sums - tl.max(shift, 0))
        total = tl.exp2(sink - shift) + tl.sum(weights, 0)
        acc = tl.sum(tl.where((weights > 0)[:, None], parts * weights[:, None], 0.0), 0)[None, :]
    acc = tl.where((total > 0)[:, None], acc / total[:, None], 0.0)
    o_at = batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_on + token * stride_ot
    to = out + o_at[:, None] + column[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=row_valid[:, None] & column_valid[None, :])
    if tl.program_id(1) == 0:
        lse_at = (batch * groups * heads + head).to(tl.int64) * tokens + token
        tl.store(lse + lse_at, (tl.log2(total) + shift) * LN2, mask=row_valid)
