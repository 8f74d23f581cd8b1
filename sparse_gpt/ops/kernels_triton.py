"""Triton kernels over block-sparse weights. It imports triton: import this module lazily.

Tensors are row-major, `tokens` rows each, their features adjacent; `*_stride` is the distance of
two rows in elements. A weight is values `[slots, b_out, b_in]` and the views of its `BlockLayout`,
read where they lie, so that a captured graph sees a rewritten topology. Indices are int32, offsets
of rows and blocks int64. Products are summed in fp32.

Names of sizes: `WIDTH` features a block has on the side of the output, `INNER` on the side that is
summed over.
"""

import triton
import triton.language as tl


@triton.jit
def _bell_and_tail(z):
    """exp(-z^2 / 2), and the standard normal distribution at -|z|.

    By formula 7.1.26 of Abramowitz and Stegun (1964), within 8e-8 of the distribution: the library
    function takes so many registers that large tiles spill.
    """
    bell = tl.exp(-0.5 * z * z)
    t = 1.0 / (1.0 + 0.2316418882 * tl.abs(z))  # 0.3275911 / sqrt(2)
    series = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
    return bell, 0.5 * bell * t * (0.254829592 + t * (-0.284496736 + t * series))


@triton.jit
def _gelu(z, KIND: tl.constexpr):
    if KIND == "gelu":
        _, tail = _bell_and_tail(z)
        return tl.maximum(z, 0.0) - tl.abs(z) * tail
    # tanh(u) = 2 sigmoid(2u) - 1
    return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))


@triton.jit
def _gelu_slope(z, KIND: tl.constexpr):
    if KIND == "gelu":
        bell, tail = _bell_and_tail(z)
        return tl.where(z < 0.0, tail, 1.0 - tail) + 0.3989422804014327 * z * bell
    gate = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    inner = 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    return gate + z * gate * (1.0 - gate) * inner


@triton.jit
def _add_products(
    sums, inputs, stride, values, pointers, slots, minors, major, rows, live,
    WIDTH: tl.constexpr, INNER: tl.constexpr, DEPTH: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums [TOKENS, WIDTH] plus the products of one block row (or column) of one weight."""
    STEPS: tl.constexpr = INNER // DEPTH
    wide, deep = tl.arange(0, WIDTH), tl.arange(0, DEPTH)
    row_starts = inputs + rows.to(tl.int64)[:, None] * stride
    first, last = tl.load(pointers + major), tl.load(pointers + major + 1)
    for step in range(first * STEPS, last * STEPS):
        entry = step // STEPS
        inner = (step - entry * STEPS) * DEPTH + deep
        features = tl.load(minors + entry) * INNER + inner
        left = tl.load(row_starts + features[None, :], mask=live[:, None], other=0.0)
        block = values + tl.load(slots + entry).to(tl.int64) * (WIDTH * INNER)
        if TRANSPOSED:
            right = tl.load(block + inner[:, None] * WIDTH + wide[None, :])
        else:
            right = tl.load(block + wide[None, :] * INNER + inner[:, None])
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    return sums


@triton.jit(do_not_specialize=["tokens"])
def dsd(
    inputs0, stride0, values0, pointers0, slots0, minors0,
    inputs1, stride1, values1, pointers1, slots1, minors1,
    inputs2, stride2, values2, pointers2, slots2, minors2,
    partial, bias, before, output, tokens, majors,
    WIDTH: tl.constexpr, INNER: tl.constexpr, TRANSPOSED: tl.constexpr, ACTIVATION: tl.constexpr,
    TOKENS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dense = sparse weight times dense: Y = act(X W^T + b), or dX = sum_i dY_i W_i.

    Forward goes by rows (`pointers`, `slots`, `minors`: row_ptr, row_slot, col_idx), dX by columns
    with `TRANSPOSED`: values are never moved, only indexed as [out, in] or [in, out]. One program
    makes TOKENS x WIDTH outputs of block row (column) `major`. Up to three weights are summed in
    registers; those after the first may be None. Also None or: `partial`, added to the sum;
    `bias [majors * WIDTH]`; `before`, gets what the activation is applied to.
    """
    # Programs that run at the same time share BAND tiles of the input and some blocks in L2.
    tiles = tl.cdiv(tokens, TOKENS)
    place = tl.program_id(0)
    band = place // (BAND * majors)
    height = tl.minimum(tiles - band * BAND, BAND)
    place -= band * BAND * majors
    tile, major = band * BAND + place % height, place // height

    rows = tile * TOKENS + tl.arange(0, TOKENS)
    live = rows < tokens
    sums = tl.zeros((TOKENS, WIDTH), tl.float32)
    sums = _add_products(
        sums, inputs0, stride0, values0, pointers0, slots0, minors0, major, rows, live,
        WIDTH, INNER, DEPTH, TRANSPOSED, PRECISION,
    )  # fmt: skip
    if inputs1 is not None:
        sums = _add_products(
            sums, inputs1, stride1, values1, pointers1, slots1, minors1, major, rows, live,
            WIDTH, INNER, DEPTH, TRANSPOSED, PRECISION,
        )  # fmt: skip
    if inputs2 is not None:
        sums = _add_products(
            sums, inputs2, stride2, values2, pointers2, slots2, minors2, major, rows, live,
            WIDTH, INNER, DEPTH, TRANSPOSED, PRECISION,
        )  # fmt: skip

    features = major * WIDTH + tl.arange(0, WIDTH)
    at = rows.to(tl.int64)[:, None] * (majors * WIDTH) + features[None, :]
    kept = live[:, None]
    if partial is not None:
        sums += tl.load(partial + at, mask=kept, other=0.0).to(tl.float32)
    if bias is not None:
        sums += tl.load(bias + features)[None, :].to(tl.float32)
    result = sums.to(output.dtype.element_ty)
    if before is not None:
        tl.store(before + at, result, mask=kept)
    if ACTIVATION is not None:
        # Of the rounded sum: what the backward pass and the masked layer see.
        result = _gelu(result.to(tl.float32), ACTIVATION).to(output.dtype.element_ty)
    tl.store(output + at, result, mask=kept)


@triton.jit
def _add_outer(
    sums, wide, wide_stride, wide_features, wide_live, thin, thin_stride, thin_features, thin_live,
    start, stop, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums [wide features, thin features] plus wide^T thin over the tokens from start to stop.

    `wide_live`, `thin_live`: which features there are; both None: all.
    """
    deep, step = tl.arange(0, DEPTH), tl.full((), DEPTH, tl.int64)
    rows = (start + deep).to(tl.int64)[:, None]
    wide_at = wide + rows * wide_stride + wide_features[None, :]
    thin_at = thin + rows * thin_stride + thin_features[None, :]
    for token in range(start, stop, DEPTH):
        live = (token + deep < stop)[:, None]
        if wide_live is None:
            left = tl.load(wide_at, mask=live, other=0.0)
            right = tl.load(thin_at, mask=live, other=0.0)
        else:
            left = tl.load(wide_at, mask=live & wide_live[None, :], other=0.0)
            right = tl.load(thin_at, mask=live & thin_live[None, :], other=0.0)
        sums = tl.dot(tl.trans(left), right, sums, input_precision=PRECISION)
        wide_at += step * wide_stride
        thin_at += step * thin_stride
    return sums


@triton.jit(do_not_specialize=["tokens", "chunk"])
def sdd(
    gradient, gradient_stride, inputs, inputs_stride, output,
    row_ptr, row_slot, col_idx, tokens, chunk, block_rows, total,
    OUT: tl.constexpr, IN: tl.constexpr, GROUP: tl.constexpr, SEARCH: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sparse = dense times dense: the blocks of dW = dY^T X, into their slots.

    One program makes up to GROUP consecutive blocks of one block row, as one tile of
    [GROUP * IN, OUT]: tensor cores want more rows than a small block has. Row r has the programs
    from row_ptr[r] // GROUP + r on: at least as many as its groups, `block_rows + total // GROUP`
    in all whatever the topology, and found by bisection (SEARCH steps), so nothing is tabulated.
    Program (g, p) sums the p-th `chunk` of tokens into `output[p]`, each `total` slots.
    """
    program, part = tl.program_id(0), tl.program_id(1)
    low, high = tl.full((), 0, tl.int32), block_rows
    for _ in range(SEARCH):
        middle = (low + high) // 2
        beyond = tl.load(row_ptr + middle) // GROUP + middle > program
        high = tl.where(beyond, middle, high)
        low = tl.where(beyond, low, middle)
    first, last = tl.load(row_ptr + low), tl.load(row_ptr + low + 1)
    first += (program - first // GROUP - low) * GROUP
    if first >= last:
        return

    lanes = tl.arange(0, GROUP * IN)
    entries = first + lanes // IN
    live = entries < last
    # Reading the first entry again keeps what follows free of a mask on features.
    entries = tl.where(live, entries, first)
    in_features = tl.load(col_idx + entries) * IN + lanes % IN
    out_lanes = tl.arange(0, OUT)
    sums = _add_outer(
        tl.zeros((GROUP * IN, OUT), tl.float32),
        inputs, inputs_stride, in_features, None,
        gradient, gradient_stride, low * OUT + out_lanes, None,
        part * chunk, tl.minimum((part + 1) * chunk, tokens), DEPTH, PRECISION,
    )  # fmt: skip
    blocks = part.to(tl.int64) * total + tl.load(row_slot + entries)
    at = output + (blocks * (OUT * IN) + lanes % IN)[:, None] + out_lanes[None, :] * IN
    tl.store(at, sums.to(output.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=["tokens"])
def score(
    gradient, gradient_stride, inputs, inputs_stride, output, tokens, out_features, in_features,
    OUT: tl.constexpr, IN: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`output [rows, columns]`: squared L2 norm of every block of dY^T X, active or not.

    One program makes the gradient of INS x OUTS features in registers, and writes its norms only.
    """
    across = tl.cdiv(in_features, INS)
    in_tile, out_tile = tl.program_id(0) % across, tl.program_id(0) // across
    ins, outs = in_tile * INS + tl.arange(0, INS), out_tile * OUTS + tl.arange(0, OUTS)
    sums = _add_outer(
        tl.zeros((INS, OUTS), tl.float32),
        inputs, inputs_stride, ins, ins < in_features,
        gradient, gradient_stride, outs, outs < out_features,
        0, tokens, DEPTH, PRECISION,
    )  # fmt: skip
    squares = tl.reshape(sums * sums, (INS // IN, IN, OUTS // OUT, OUT))
    norms = tl.sum(tl.sum(squares, 3), 1)
    columns = in_tile * (INS // IN) + tl.arange(0, INS // IN)
    rows = out_tile * (OUTS // OUT) + tl.arange(0, OUTS // OUT)
    width = in_features // IN
    at = output + rows.to(tl.int64)[None, :] * width + columns[:, None]
    tl.store(at, norms, mask=(columns < width)[:, None] & (rows < out_features // OUT)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def activation_backward(
    gradient, before, output, bias_sums, tokens, features,
    ACTIVATION: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dZ = dY act'(Z), all `[tokens, features]` without gaps; and column sums a tile of tokens.

    `bias_sums [tiles, features]`, fp32, or None: the parts of a bias's gradient.
    """
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    at = rows.to(tl.int64)[:, None] * features + columns[None, :]
    live = (rows < tokens)[:, None] & (columns < features)[None, :]
    slope = _gelu_slope(tl.load(before + at, mask=live, other=0.0).to(tl.float32), ACTIVATION)
    result = tl.load(gradient + at, mask=live, other=0.0).to(tl.float32) * slope
    rounded = result.to(output.dtype.element_ty)
    tl.store(output + at, rounded, mask=live)
    if bias_sums is not None:
        sums = tl.sum(rounded.to(tl.float32), 0)
        place = tl.program_id(0).to(tl.int64) * features + columns
        tl.store(bias_sums + place, sums, mask=columns < features)


@triton.jit
def move(
    weight, values, slots, in_features, total,
    OUT: tl.constexpr, IN: tl.constexpr, SCATTER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Active blocks to (`SCATTER`) or from their places in a dense `[out, in]` weight.

    `total`: elements of values. Blocks of any size, 1 x 1 too.
    """
    lanes = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = lanes < total
    place = tl.load(slots + lanes // (OUT * IN), mask=live, other=0)
    columns = in_features // IN
    row = (place // columns).to(tl.int64) * OUT + (lanes // IN) % OUT
    at = weight + row * in_features + (place % columns) * IN + lanes % IN
    if SCATTER:
        tl.store(at, tl.load(values + lanes, mask=live), mask=live)
    else:
        tl.store(values + lanes, tl.load(at, mask=live), mask=live)
