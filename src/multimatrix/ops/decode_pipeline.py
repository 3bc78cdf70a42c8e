"""Split-KV decoding for Hopper in Gluon, for caches that a product cannot take as they are.

What `decode_kernels.split_kernel` leaves for the combining kernel, by three groups of four warps that hand tiles of the
cache to each other in shared memory:

    load      copies tiles of keys and values; slots outside the run become zeros
    convert   turns keys (ROTATE), or widens e4m3 values to half precision (OWN, KEY)
    attend    scores, softmax and output: this tile's output is summed while the next one's softmax is made

so that none of the three waits for the other two. A tile goes round like this:

    ROTATE      load -> [keys] -> convert -> [turned keys] -> attend's scores;   [keys] -> attend's output
    OWN, KEY    load -> [keys] -> attend's scores;   [values] -> convert -> [wide values] -> attend's output

It takes heads of one power of two, whole rotations and neither masks nor biases; all else is `split_kernel`'s, where
arguments are explained. Values outside a sequence are never read: their memory may hold anything.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

REGISTERS = 168  # of a thread on average; the attending warps get what the others leave
LOAD_REGISTERS, CONVERT_REGISTERS = gl.constexpr(88), gl.constexpr(176)
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
OWN, ROTATE = gl.constexpr(0), gl.constexpr(3)  # as in decode_kernels
BLOCK_R = gl.constexpr(64)  # rows of a product
TURNED = gl.constexpr(32)  # slots that one row of the origins serves
CONVERTED = gl.constexpr(2)  # tiles that the converting warps may be ahead
NO_SWIZZLE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _next(slot, phase, STAGES: gl.constexpr):
    """The next slot of a ring, and how often the ring has come round, modulo 2."""
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _rows(n, valid, table, stride_page, stride_slot, PAGE: gl.constexpr):
    if PAGE == 0:
        return n.to(gl.int64) * stride_slot
    else:
        page = gl.load(table + n // PAGE, mask=valid, other=0).to(gl.int64)
        return page * stride_page + (n % PAGE) * stride_slot


@gluon.jit
def _copy_tile(to, pointer, table, stride_page, stride_slot, first, high, PAGE: gl.constexpr):
    """A tile [BLOCK_N, columns] of the cache, asynchronously, 16 bytes a thread."""
    BLOCK_N: gl.constexpr = to.shape[0]
    WIDTH: gl.constexpr = to.shape[1]
    VECTOR: gl.constexpr = 128 // to.dtype.primitive_bitwidth
    ACROSS: gl.constexpr = min(32, WIDTH // VECTOR)
    layout: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    n = first + gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    valid = n < high
    rows = _rows(n, valid, table, stride_page, stride_slot, PAGE)
    mask = valid[:, None] & (columns >= 0)[None, :]
    async_copy.async_copy_global_to_shared(to, pointer + rows[:, None] + columns[None, :], mask=mask)


@gluon.jit
def _copy_scales(to, pointer, table, stride_page, stride_slot, first, high, PAGE: gl.constexpr):
    n = first + gl.arange(0, to.shape[0], gl.BlockedLayout([1], [32], [4], [0]))
    valid = n < high
    rows = _rows(n, valid, table, stride_page, stride_slot, PAGE)
    async_copy.async_copy_global_to_shared(to, pointer + rows, mask=valid)


@gluon.jit
def _load_warps(
    cache,  # pointers of keys, values, their scales and the origins of rotations
    strides,  # of a page and of a slot: of keys, of values, of scales
    table,
    run,
    tiles,  # rings of what is copied: keys, keys of the second half, values
    vectors,  # rings of key scales, value scales and origins
    full,
    empty,
    MODE: gl.constexpr,
):
    VALUE: gl.constexpr = MODE[0]
    SCALES: gl.constexpr = MODE[1]
    PAGE: gl.constexpr = MODE[2]
    key, value, key_scale, value_scale, origin = cache
    stride_kb, stride_ks, stride_vb, stride_vs, stride_sb, stride_ss = strides
    low, high = run
    keys, second_keys, values = tiles
    key_scales, value_scales, origins = vectors
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    ORIGINS: gl.constexpr = 2 * (BLOCK_N // TURNED)
    slot = 0
    phase = 1  # a fresh barrier has completed the phase before its first
    for first in range(low, high, BLOCK_N):
        mbarrier.wait(empty.index(slot), phase)
        _copy_tile(keys.index(slot), key, table, stride_kb, stride_ks, first, high, PAGE)
        if VALUE == ROTATE:
            second = key + keys.shape[2]
            _copy_tile(second_keys.index(slot), second, table, stride_kb, stride_ks, first, high, PAGE)
            HALF: gl.constexpr = keys.shape[2]
            pairs = gl.arange(0, HALF, gl.BlockedLayout([1], [32], [4], [0]))
            at = origin + (first // TURNED).to(gl.int64) * (2 * HALF) + pairs
            for row in gl.static_range(ORIGINS):
                async_copy.async_copy_global_to_shared(origins.index(slot * ORIGINS + row), at + row * HALF)
        if VALUE == OWN:
            _copy_tile(values.index(slot), value, table, stride_vb, stride_vs, first, high, PAGE)
        if SCALES == 2:
            _copy_scales(key_scales.index(slot), key_scale, table, stride_sb, stride_ss, first, high, PAGE)
            _copy_scales(value_scales.index(slot), value_scale, table, stride_sb, stride_ss, first, high, PAGE)
        async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
        slot, phase = _next(slot, phase, STAGES)


@gluon.jit
def _turn_warps(local, run, keys, second_keys, origins, turned, second_turned, full, empty, converted, taken):
    """Both halves of keys, turned in half precision as `split_kernel` does it."""
    low, high = run
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    HALF: gl.constexpr = keys.shape[2]
    PARTS: gl.constexpr = BLOCK_N // TURNED
    ACROSS: gl.constexpr = HALF // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    of_pairs: gl.constexpr = gl.SliceLayout(0, layout)
    d = gl.arange(0, TURNED, gl.SliceLayout(1, layout))
    local_at = local + d[:, None] * HALF + gl.arange(0, HALF, of_pairs)[None, :]
    local_cos = gl.load(local_at).to(gl.float16)
    local_sin = gl.load(local_at + TURNED * HALF).to(gl.float16)
    slot = 0
    phase = 0
    to = 0
    to_phase = 1
    for _ in range(low, high, BLOCK_N):
        mbarrier.wait(full.index(slot), phase)
        mbarrier.wait(taken.index(to), to_phase)
        for part in gl.static_range(PARTS):
            row = 2 * (slot * PARTS + part)
            origin_cos = origins.index(row).load(of_pairs).to(gl.float16)[None, :]
            origin_sin = origins.index(row + 1).load(of_pairs).to(gl.float16)[None, :]
            left = keys.index(slot).slice(part * TURNED, TURNED).load(layout).to(gl.float16)
            right = second_keys.index(slot).slice(part * TURNED, TURNED).load(layout).to(gl.float16)
            cos = origin_cos * local_cos - origin_sin * local_sin
            sin = origin_sin * local_cos + origin_cos * local_sin
            turned.index(to).slice(part * TURNED, TURNED).store(left * cos - right * sin)
            second_turned.index(to).slice(part * TURNED, TURNED).store(right * cos + left * sin)
        fence_async_shared()
        mbarrier.arrive(converted.index(to), count=1)
        mbarrier.arrive(empty.index(slot), count=1)
        slot, phase = _next(slot, phase, STAGES)
        to, to_phase = _next(to, to_phase, CONVERTED)


@gluon.jit
def _widen_warps(run, narrow, wide, full, empty, converted, taken):
    low, high = run
    STAGES: gl.constexpr = narrow.shape[0]
    BLOCK_N: gl.constexpr = narrow.shape[1]
    ACROSS: gl.constexpr = min(32, narrow.shape[2] // 16)
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    slot = 0
    phase = 0
    to = 0
    to_phase = 1
    for _ in range(low, high, BLOCK_N):
        mbarrier.wait(full.index(slot), phase)
        mbarrier.wait(taken.index(to), to_phase)
        wide.index(to).store(narrow.index(slot).load(layout).to(gl.float16))
        fence_async_shared()
        mbarrier.arrive(converted.index(to), count=1)
        mbarrier.arrive(empty.index(slot), count=1)
        slot, phase = _next(slot, phase, STAGES)
        to, to_phase = _next(to, to_phase, CONVERTED)


@gluon.jit
def _scores(queries, keys, second_keys, layout: gl.constexpr):  # [BLOCK_R, BLOCK_N]
    """Products of a tile, started: both halves of turned keys, or both parts of the query with the same keys.

    The second part, which is small, comes first: the sum of e4m3 products is cut to 14 bits at every step.
    """
    BLOCK_N: gl.constexpr = keys.shape[0]
    nothing = gl.zeros([BLOCK_R, BLOCK_N], gl.float32, layout)
    query, second_query = queries
    s = warpgroup_mma(second_query, second_keys.permute((1, 0)), nothing, use_acc=False, is_async=True)
    return warpgroup_mma(query, keys.permute((1, 0)), s, is_async=True)


@gluon.jit
def _softmax(
    s, top, total, factor, position, scales, first, high, KIND: gl.constexpr, SCALES: gl.constexpr, CAUSAL: gl.constexpr
):
    """Weights of a tile, what the sums so far decay by, and the new largest scores and sums."""
    key_scales, value_scales = scales
    columns: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    n = first + gl.arange(0, s.shape[1], columns)
    s *= factor[:, None]
    if SCALES == 2:
        s *= key_scales.load(columns)[None, :]
        # As in split_kernel: exponents of the values' scales belong to the scores.
        bits = gl.maximum(gl.where(n < high, value_scales.load(columns), 1.0), 1e-30).to(gl.int32, bitcast=True)
        exponent = bits >> 23
        s += (exponent - 127).to(gl.float32)[None, :]
    if CAUSAL:
        s = gl.where(n[None, :] <= position[:, None], s, float("-inf"))
    s = gl.where((n < high)[None, :], s, float("-inf"))
    new_top = gl.maximum(top, gl.max(s, 1))
    shift = gl.where(new_top == float("-inf"), 0.0, new_top)
    p = gl.exp2(s - shift[:, None])
    decay = gl.exp2(top - shift)
    if SCALES == 2:
        total = total * decay + gl.sum(p * ((254 - exponent) << 23).to(gl.float32, bitcast=True)[None, :], 1)
        p *= ((bits & 0x7FFFFF) | 0x3F800000).to(gl.float32, bitcast=True)[None, :]
    else:
        total = total * decay + gl.sum(p, 1)
    return p.to(KIND), decay, new_top, total


@gluon.jit
def _attend_warps(
    tensors,  # pointers of the query, the output, its sums, and the scales of a tensor
    sizes,  # heads, tokens, groups, num_splits, length
    strides,  # of the query and of the output: batch, head, token
    scale,
    run,
    queries,  # in shared memory: two halves, or two parts
    tiles,  # rings: what scores take, twice, and what the output takes, twice; the second of each for second halves
    vectors,
    barriers,
    MODE: gl.constexpr,
):
    VALUE: gl.constexpr = MODE[0]
    SCALES: gl.constexpr = MODE[1]
    CAUSAL: gl.constexpr = MODE[3]
    DIRECT: gl.constexpr = MODE[4]
    EARLY: gl.constexpr = MODE[5]
    query, out, lse, key_scale, value_scale = tensors
    heads, tokens, groups, num_splits, length = sizes
    stride_qb, stride_qn, stride_qt, stride_ob, stride_on, stride_ot = strides
    low, high = run
    full, empty, converted, taken = barriers
    scored, second_scored, summed, second_summed = tiles
    BLOCK_N: gl.constexpr = scored.shape[1]
    CHUNK: gl.constexpr = scored.shape[2]
    WIDTH: gl.constexpr = summed.shape[2]
    STAGES: gl.constexpr = full.shape[0]
    KIND: gl.constexpr = summed.dtype
    split = gl.program_id(0)
    group = gl.program_id(1) % groups
    block = gl.program_id(1) // groups
    batch = gl.program_id(2)
    rows = heads * tokens

    ACROSS: gl.constexpr = min(32, CHUNK // 8)
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    DEPTH: gl.constexpr = 16 if VALUE == ROTATE else 32
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, DEPTH])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    score_rows: gl.constexpr = gl.SliceLayout(1, score_layout)
    out_rows: gl.constexpr = gl.SliceLayout(1, out_layout)

    row = block * BLOCK_R + gl.arange(0, BLOCK_R, gl.SliceLayout(1, load_layout))
    head = group * heads + row // tokens
    at = batch.to(gl.int64) * stride_qb + head.to(gl.int64) * stride_qn + (row % tokens) * stride_qt
    columns = gl.arange(0, CHUNK, gl.SliceLayout(0, load_layout))
    mask = (row < rows)[:, None] & (columns >= 0)[None, :]
    query += at[:, None] + columns[None, :]
    q = gl.load(query, mask=mask, other=0.0)
    factor = gl.full([BLOCK_R], 1.0, gl.float32, score_rows) * scale * LOG2E
    value_factor = 1.0
    if SCALES == 1:
        factor *= gl.load(key_scale)
        value_factor = gl.load(value_scale)
    if VALUE == ROTATE:
        queries[0].store(q.to(gl.float16))
        queries[1].store(gl.load(query + CHUNK, mask=mask, other=0.0).to(gl.float16))
    else:
        # The sum of two e4m3, in units of a power of two, as in split_kernel.
        q = q.to(gl.float32)
        largest = gl.maximum(gl.max(gl.abs(q), 1), 1e-30)
        unit = (largest.to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True) / 128
        q = q / unit[:, None]
        high_part = q.to(gl.float8e4nv)
        queries[0].store(high_part)
        queries[1].store((q - high_part.to(gl.float32)).to(gl.float8e4nv))
        factor *= gl.convert_layout(unit, score_rows)
    fence_async_shared()

    score_row = block * BLOCK_R + gl.arange(0, BLOCK_R, score_rows)
    position = length - tokens + score_row % tokens
    top = gl.full([BLOCK_R], float("-inf"), gl.float32, score_rows)
    total = gl.full([BLOCK_R], 0.0, gl.float32, score_rows)
    acc = gl.zeros([BLOCK_R, WIDTH], gl.float32, out_layout)
    second_acc = acc
    OUT_PRODUCTS: gl.constexpr = 2 if VALUE == ROTATE else 1
    # Turned keys lie in the ring of the converting warps, others in that of the loading ones.
    ready: gl.constexpr = VALUE == ROTATE
    slot = 0
    phase = 0
    to = 0
    to_phase = 0
    mbarrier.wait((converted if ready else full).index(0), 0, pred=low < high)
    fence_async_shared()
    s = _scores(queries, scored.index(0), second_scored.index(0), score_layout)
    s = warpgroup_mma_wait(0, deps=[s])
    if VALUE == ROTATE:
        mbarrier.arrive(taken.index(0), count=1, pred=low < high)
    scales = (vectors[0].index(0), vectors[1].index(0))
    p, decay, top, total = _softmax(s, top, total, factor, position, scales, low, high, KIND, SCALES, CAUSAL)
    for first in range(low, high, BLOCK_N):
        more = first + BLOCK_N < high
        next_slot, next_phase = _next(slot, phase, STAGES)
        next_to, next_to_phase = _next(to, to_phase, CONVERTED)
        if VALUE == ROTATE:
            mbarrier.wait(converted.index(next_to), next_to_phase, pred=more)
            mbarrier.wait(full.index(slot), phase)
        else:
            mbarrier.wait(full.index(next_slot), next_phase, pred=more)
            mbarrier.wait(converted.index(to), to_phase)
        fence_async_shared()
        # Past the last tile these are of whatever lies there, and their weights 0.
        scoring = next_to if VALUE == ROTATE else next_slot
        s = _scores(queries, scored.index(scoring), second_scored.index(scoring), score_layout)
        weights = gl.convert_layout(p, gl.DotOperandLayout(0, out_layout, 2))
        summing = slot if VALUE == ROTATE else to
        acc = warpgroup_mma(weights, summed.index(summing), acc, is_async=True)
        if VALUE == ROTATE:
            second_acc = warpgroup_mma(weights, second_summed.index(summing), second_acc, is_async=True)
        s = warpgroup_mma_wait(OUT_PRODUCTS, deps=[s])
        scales = (vectors[0].index(next_slot), vectors[1].index(next_slot))
        p, decay, top, total = _softmax(
            s, top, total, factor, position, scales, first + BLOCK_N, high, KIND, SCALES, CAUSAL
        )
        rescale = gl.convert_layout(decay, out_rows)[:, None]
        if VALUE == ROTATE:
            acc, second_acc = warpgroup_mma_wait(0, deps=[acc, second_acc])
            second_acc *= rescale
            mbarrier.arrive(taken.index(next_to), count=1, pred=more)
        else:
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(taken.index(to), count=1)
        acc *= rescale
        mbarrier.arrive(empty.index(slot), count=1)
        slot, phase = next_slot, next_phase
        to, to_phase = next_to, next_to_phase

    if EARLY:
        gdc_launch_dependents()
    total2 = gl.log2(total) + top  # -inf where nothing was seen
    weight = gl.convert_layout(gl.where(total > 0, value_factor / total, 0.0), out_rows)[:, None]
    out_row = block * BLOCK_R + gl.arange(0, BLOCK_R, out_rows)
    if DIRECT:
        score_head = group * heads + score_row // tokens
        lse_at = (batch * groups * heads + score_head).to(gl.int64) * tokens + score_row % tokens
        out_head = group * heads + out_row // tokens
        o_at = batch.to(gl.int64) * stride_ob + out_head.to(gl.int64) * stride_on + (out_row % tokens) * stride_ot
        total2 *= LN2
    else:
        part = ((batch * groups + group) * num_splits + split).to(gl.int64) * rows
        lse_at = part + score_row
        o_at = (part + out_row) * (OUT_PRODUCTS * WIDTH)
    gl.store(lse + lse_at, total2, mask=score_row < rows)
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, out_layout))
    out += o_at[:, None] + columns[None, :]
    mask = (out_row < rows)[:, None] & (columns >= 0)[None, :]
    gl.store(out, (acc * weight).to(out.dtype.element_ty), mask=mask)
    if VALUE == ROTATE:
        gl.store(out + WIDTH, (second_acc * weight).to(out.dtype.element_ty), mask=mask)


@gluon.jit
def pipeline_kernel(
    query,
    key,
    value,
    out,
    lse,
    lengths,
    length,
    table,
    key_scale,
    value_scale,
    origin,
    local,
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
    stride_sb,
    stride_sg,
    stride_ss,
    heads,
    tokens,
    groups,
    num_splits,
    VALUE: gl.constexpr,
    DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    PAGE: gl.constexpr,
    DIRECT: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    CAUSAL: gl.constexpr,
    EARLY: gl.constexpr,
    SCALES: gl.constexpr,
):
    group = gl.program_id(1) % groups
    batch = gl.program_id(2)
    if HAS_LENGTHS:
        length = gl.load(lengths + batch * stride_lb).to(gl.int32)
    tiles_of_run = gl.cdiv(gl.cdiv(length, BLOCK_N), num_splits)
    low = gl.program_id(0) * tiles_of_run * BLOCK_N
    run = (low, gl.minimum(low + tiles_of_run * BLOCK_N, length))
    key += group.to(gl.int64) * stride_kg
    value += group.to(gl.int64) * stride_vg
    if PAGE == 0:
        key += batch.to(gl.int64) * stride_kb
        value += batch.to(gl.int64) * stride_vb
    else:
        table += batch.to(gl.int64) * stride_tb
    if SCALES == 2:
        scales_at = group.to(gl.int64) * stride_sg
        if PAGE == 0:
            scales_at += batch.to(gl.int64) * stride_sb
        key_scale += scales_at
        value_scale += scales_at

    CHUNK: gl.constexpr = DIM // 2 if VALUE == ROTATE else DIM
    WIDTH: gl.constexpr = VALUE_DIM if VALUE == OWN else CHUNK
    kind: gl.constexpr = key.dtype.element_ty
    query_kind: gl.constexpr = gl.float16 if VALUE == ROTATE else kind
    query_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_R, CHUNK], query_kind)
    key_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, CHUNK], kind)
    value_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, WIDTH], kind)
    converted_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, WIDTH], gl.float16)
    queries = (
        gl.allocate_shared_memory(query_kind, [BLOCK_R, CHUNK], query_layout),
        gl.allocate_shared_memory(query_kind, [BLOCK_R, CHUNK], query_layout),
    )
    keys = gl.allocate_shared_memory(kind, [STAGES, BLOCK_N, CHUNK], key_layout)
    made = gl.allocate_shared_memory(gl.float16, [CONVERTED, BLOCK_N, WIDTH], converted_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    converted = gl.allocate_shared_memory(gl.int64, [CONVERTED, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [CONVERTED, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=128)  # every loading thread
        mbarrier.init(empty.index(i), count=2)  # the converting and the attending warps
    for i in gl.static_range(CONVERTED):
        mbarrier.init(converted.index(i), count=1)
        mbarrier.init(taken.index(i), count=1)

    # What a mode does not have is never touched; something stands in its place.
    second_keys, second_made, values = keys, made, keys
    key_scales, value_scales, origins = full, full, full
    if VALUE == ROTATE:
        second_keys = gl.allocate_shared_memory(kind, [STAGES, BLOCK_N, CHUNK], key_layout)
        second_made = gl.allocate_shared_memory(gl.float16, [CONVERTED, BLOCK_N, CHUNK], converted_layout)
        origins = gl.allocate_shared_memory(gl.float32, [STAGES * 2 * (BLOCK_N // TURNED), CHUNK], NO_SWIZZLE)
        attended = (made, second_made, keys, second_keys)
        convert = (local, run, keys, second_keys, origins, made, second_made, full, empty, converted, taken)
    else:
        if VALUE == OWN:
            values = gl.allocate_shared_memory(kind, [STAGES, BLOCK_N, WIDTH], value_layout)
        attended = (keys, keys, made, made)
        convert = (run, values, made, full, empty, converted, taken)
    if SCALES == 2:
        key_scales = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], NO_SWIZZLE)
        value_scales = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], NO_SWIZZLE)
    vectors = (key_scales, value_scales, origins)

    # Constants stay constants in one tuple.
    MODE: gl.constexpr = (VALUE, SCALES, PAGE, CAUSAL, DIRECT, EARLY)
    cache = (key, value, key_scale, value_scale, origin)
    cache_strides = (stride_kb, stride_ks, stride_vb, stride_vs, stride_sb, stride_ss)
    copied = (keys, second_keys, values)
    load = (cache, cache_strides, table, run, copied, vectors, full, empty, MODE)
    tensors = (query, out, lse, key_scale, value_scale)
    sizes = (heads, tokens, groups, num_splits, length)
    strides = (stride_qb, stride_qn, stride_qt, stride_ob, stride_on, stride_ot)
    barriers = (full, empty, converted, taken)
    attend = (tensors, sizes, strides, scale, run, queries, attended, vectors, barriers, MODE)
    gl.warp_specialize(
        [
            (_attend_warps, attend),
            (_load_warps, load),
            (_turn_warps if VALUE == ROTATE else _widen_warps, convert),
        ],
        [4, 4],
        [LOAD_REGISTERS, CONVERT_REGISTERS],
    )
