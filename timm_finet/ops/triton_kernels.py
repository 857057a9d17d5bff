"""The moment form's kernels in Triton; triton_passes.py chooses their blocks and launches them.

An activation in channels_last is a matrix with a row for each of its P positions: `x` is `(P, C)`, `y` is `(P, OUT)`.
Each of the G groups has SIZE = C / G input channels. A matrix of products `x_i x_j` within the groups has one block for
each group and is stored as `(C, SIZE)`. The algebra and the names are those of moment_form.py, but the folded
convolutions take `x` itself.

BP, BC, BO and BS are the sizes of blocks of positions, input channels, output channels and one group's channels. A tile
has BC columns of `x`. Tiles are cut from blocks of WIDTH columns. A block contains as many whole groups as fit into one
tile, or one group that takes several tiles.

A sum over positions is split among programs. Each program writes a partial sum, and another kernel adds the partial
sums. There are no atomics, so a step gives the same result each time.
"""
import triton
import triton.language as tl


# ---------------------------------------------------------------------------------------------------------------------
# Passes over the activations

@triton.jit
def tile_columns(block, tile, C: tl.constexpr, WIDTH: tl.constexpr, BC: tl.constexpr):
    """The columns of a tile of a block, and which of them exist."""
    c = tile * BC + tl.arange(0, BC)
    column = block * WIDTH + c
    return column, (c < WIDTH) & (column < C)


@triton.jit
def at_rows(x, row, column, C: tl.constexpr):
    """Pointers into a matrix of C columns, which may have more than 2^31 elements."""
    return x + row[:, None].to(tl.int64) * C + column[None, :]


@triton.jit
def load_rows(x, row, end, column, exists, C: tl.constexpr):
    """Load the rows before `end`; the others are zero."""
    mask = (row[:, None] < end) & exists[None, :]
    return tl.load(at_rows(x, row, column, C), mask, 0.0)


@triton.jit
def load_shifted(x, row, end, column, exists, shift, C: tl.constexpr):
    """Load `c = x - shift` in the dtype of `x`; rows from `end` on are zero."""
    mask = (row[:, None] < end) & exists[None, :]
    value = tl.load(at_rows(x, row, column, C), mask, 0.0)
    return tl.where(mask, value.to(tl.float32) - shift[None, :], 0.0).to(x.dtype.element_ty)


@triton.jit
def same_group(i, i_exists, j, j_exists, SIZE: tl.constexpr):
    """The column of the entry of channels i and j in row i of a `(C, SIZE)` matrix, and whether there is one."""
    k = j[None, :] - i[:, None] // SIZE * SIZE
    return k, i_exists[:, None] & j_exists[None, :] & (k >= 0) & (k < SIZE)


@triton.jit
def choose_shift(x, P, column, exists, C: tl.constexpr, BP: tl.constexpr):
    """The mean of a sample of BP positions if it is more than four standard deviations from zero, else zero.

    In half precision `x - shift` is exact only near the shift; elsewhere its rounding costs more than the shift saves.
    """
    row = tl.arange(0, BP).to(tl.int64) * P // BP
    value = load_rows(x, row, P, column, exists, C).to(tl.float32)
    mean = tl.sum(value, 0) / BP
    deviation = value - mean[None, :]
    shift = tl.where(mean * mean > 16 * tl.sum(deviation * deviation, 0) / BP, mean, 0.0)
    return shift.to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def moments_kernel(
        x, shift, partial_products, partial_sums, P, split_rows,
        C: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """Compute the shift `(C,)`, and sums of `c = x - shift` over the rows of each split.

    The sums are `sum c_i c_j` within the groups `(splits, C, SIZE)` and `sum c_i` `(splits, C)`. A program takes a pair
    of tiles of one block, and a split.
    """
    TILES: tl.constexpr = (WIDTH + BC - 1) // BC
    split = tl.program_id(1)
    i, j = tl.program_id(0) // TILES % TILES, tl.program_id(0) % TILES
    if j > i:  # the transpose of another pair's products
        return
    block = tl.program_id(0) // (TILES * TILES)
    column_i, exists_i = tile_columns(block, i, C, WIDTH, BC)
    column_j, exists_j = tile_columns(block, j, C, WIDTH, BC)
    shift_i = choose_shift(x, P, column_i, exists_i, C, BP)
    shift_j = shift_i
    if TILES > 1:
        shift_j = choose_shift(x, P, column_j, exists_j, C, BP)

    product = tl.zeros((BC, BC), tl.float32)
    total = tl.zeros((BP, BC), tl.float32)
    end = min(P, (split + 1) * split_rows)
    for p in range(split * split_rows, end, BP):
        row = p + tl.arange(0, BP)
        c_i = load_shifted(x, row, end, column_i, exists_i, shift_i, C)
        c_j = c_i
        if TILES > 1:
            c_j = load_shifted(x, row, end, column_j, exists_j, shift_j, C)
        product = tl.dot(tl.trans(c_i), c_j, product)
        total += c_i.to(tl.float32)

    partial_products += split.to(tl.int64) * C * SIZE
    k, mask = same_group(column_i, exists_i, column_j, exists_j, SIZE)
    tl.store(partial_products + (column_i[:, None] * SIZE + k), product, mask)
    if i != j:  # two tiles of one group
        k = column_i[None, :] - column_j[:, None] // SIZE * SIZE
        at = partial_products + (column_j[:, None] * SIZE + k)
        tl.store(at, tl.trans(product), exists_j[:, None] & exists_i[None, :])
    if j == 0:
        tl.store(partial_sums + split * C + column_i, tl.sum(total, 0), exists_i)
        if split == 0:
            tl.store(shift + column_i, shift_i, exists_i)


@triton.jit
def convolve_kernel(
        x, weight, bias, y, P,
        C: tl.constexpr, OUT: tl.constexpr, G: tl.constexpr, RELU: tl.constexpr,
        BP: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr):
    """Compute `y = W' x + b'`, where `b'` is the sum of `bias` `(G, OUT)` over the groups.

    The programs are persistent: if a tile of output channels has n programs, each takes every n-th block of positions.
    """
    TILES: tl.constexpr = (OUT + BO - 1) // BO
    KEEP_WEIGHT: tl.constexpr = C <= BC  # load it once for all positions
    o, o_exists = tile_columns(0, tl.program_id(0) % TILES, OUT, OUT, BO)
    c = tl.arange(0, BC)
    if KEEP_WEIGHT:
        w = tl.load(weight + (o[None, :] * C + c[:, None]), o_exists[None, :] & (c[:, None] < C), 0.0)
    b = tl.zeros((BO,), tl.float32)
    for g in range(G):
        b += tl.load(bias + g * OUT + o, o_exists, 0.0)
    for p in range(tl.program_id(0) // TILES * BP, P, tl.num_programs(0) // TILES * BP):
        row = p + tl.arange(0, BP)
        if KEEP_WEIGHT:
            acc = tl.dot(load_rows(x, row, P, c, c < C, C), w)
        else:
            acc = tl.zeros((BP, BO), tl.float32)
            for first in range(0, C, BC):
                exists = first + c < C
                values = load_rows(x, row, P, first + c, exists, C)
                w = tl.load(weight + (o[None, :] * C + first + c[:, None]), o_exists[None, :] & exists[:, None], 0.0)
                acc = tl.dot(values, w, acc)
        acc += b[None, :]
        if RELU:
            acc = tl.where(acc < 0, 0.0, acc)  # a NaN stays NaN
        mask = (row[:, None] < P) & o_exists[None, :]
        tl.store(at_rows(y, row, o, OUT), acc.to(y.dtype.element_ty), mask)


@triton.jit
def weight_gradient_kernel(
        grad_y, x, partial_sums, P, split_rows,
        C: tl.constexpr, OUT: tl.constexpr, BP: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr):
    """Compute `sum dy x^T` `(OUT, C)` and `sum dy` `(OUT,)` over the rows of each split.

    Side by side they form a row of `partial_sums`; `unfold_kernel` adds the rows. A program takes a tile of
    output channels, a tile of input channels, and a split.
    """
    TILES: tl.constexpr = (C + BC - 1) // BC
    split, tile = tl.program_id(1), tl.program_id(0) % TILES
    o, o_exists = tile_columns(0, tl.program_id(0) // TILES, OUT, OUT, BO)
    c, c_exists = tile_columns(0, tile, C, C, BC)
    product = tl.zeros((BO, BC), tl.float32)
    # The sum of dy is a product too: if products share a load with another operation, Triton 3.6 overwrites its buffer
    # while the products still read it.
    ones, total = tl.full((BP, 16), 1, tl.float32).to(x.dtype.element_ty), tl.zeros((BO, 16), tl.float32)
    end = min(P, (split + 1) * split_rows)
    for p in range(split * split_rows, end, BP):
        row = p + tl.arange(0, BP)
        grad = tl.trans(load_rows(grad_y, row, end, o, o_exists, OUT))
        product = tl.dot(grad, load_rows(x, row, end, c, c_exists, C), product)
        total = tl.dot(grad, ones, total)
    partial_sums += split.to(tl.int64) * (OUT * C + OUT)
    tl.store(partial_sums + (o[:, None] * C + c[None, :]), product, o_exists[:, None] & c_exists[None, :])
    if tile == 0:
        tl.store(partial_sums + OUT * C + o, tl.sum(total, 1) / 16, o_exists)


@triton.jit
def input_gradient_kernel(
        grad_y, x, weight, a, b, grad_x, P,
        C: tl.constexpr, OUT: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
        BP: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr):
    """Compute `dx = W'^T dy + A x + b` in one accumulator; `a` `(C, SIZE)` is symmetric, `b` is `(C,)`.

    The programs are persistent, as in `convolve_kernel`.
    """
    TILES: tl.constexpr = (WIDTH + BC - 1) // BC
    BLOCKS: tl.constexpr = (C + WIDTH - 1) // WIDTH
    KEEP_WEIGHT: tl.constexpr = (TILES == 1) & (OUT <= BO)  # load the weight and A once for all positions
    block, tile = tl.program_id(0) // TILES % BLOCKS, tl.program_id(0) % TILES
    column, exists = tile_columns(block, tile, C, WIDTH, BC)
    o = tl.arange(0, BO)
    if KEEP_WEIGHT:
        k, a_mask = same_group(column, exists, column, exists, SIZE)
        a_block = tl.load(a + (column[:, None] * SIZE + k), a_mask, 0.0)
        w = tl.load(weight + (o[:, None] * C + column[None, :]), (o[:, None] < OUT) & exists[None, :], 0.0)
    constant = tl.load(b + column, exists, 0.0)
    for p in range(tl.program_id(0) // (BLOCKS * TILES) * BP, P, tl.num_programs(0) // (BLOCKS * TILES) * BP):
        row = p + tl.arange(0, BP)
        if KEEP_WEIGHT:
            acc = tl.dot(load_rows(x, row, P, column, exists, C), a_block)
            acc = tl.dot(load_rows(grad_y, row, P, o, o < OUT, OUT), w, acc)
        else:
            acc = tl.zeros((BP, BC), tl.float32)
            for t in range(TILES):
                c, c_exists = tile_columns(block, t, C, WIDTH, BC)
                k, a_mask = same_group(c, c_exists, column, exists, SIZE)
                values = load_rows(x, row, P, c, c_exists, C)
                acc = tl.dot(values, tl.load(a + (c[:, None] * SIZE + k), a_mask, 0.0), acc)
            for first in range(0, OUT, BO):
                grad = load_rows(grad_y, row, P, first + o, first + o < OUT, OUT)
                at = (first + o[:, None]) * C + column[None, :]
                w = tl.load(weight + at, (first + o[:, None] < OUT) & exists[None, :], 0.0)
                acc = tl.dot(grad, w, acc)
        acc += constant[None, :]
        mask = (row[:, None] < P) & exists[None, :]
        tl.store(at_rows(grad_x, row, column, C), acc.to(grad_x.dtype.element_ty), mask)


# ---------------------------------------------------------------------------------------------------------------------
# Between the passes: adding partial sums, and the algebra of moment_form.py with tensors of the weight's size

@triton.jit
def add_parts(partial_sums, splits, N: tl.constexpr, at, exists, BK: tl.constexpr):
    """Sum `partial_sums` `(splits, N)` over the splits, BK at a time, for the entries `at`, a matrix."""
    acc = tl.zeros(at.shape, tl.float32)
    for k in range(0, splits, BK):
        split = k + tl.arange(0, BK)[:, None, None]
        mask = (split < splits) & exists[None, :, :]
        acc += tl.sum(tl.load(partial_sums + split.to(tl.int64) * N + at[None, :, :], mask, 0.0), 0)
    return acc


@triton.jit
def covariances_kernel(
        partial_products, partial_sums, shifted_mean, cov, splits, count,
        C: tl.constexpr, SIZE: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr):
    """Compute `E[c]` `(C,)` and `E[c_i c_j] - E[c_i] E[c_j]` `(C, SIZE)` over all splits.

    A program takes one channel i and a block of channels j.
    """
    i = tl.program_id(0)
    j = tl.program_id(1) * BS + tl.arange(0, BS)
    product, sum_j, sum_i = tl.zeros((BS,), tl.float32), tl.zeros((BS,), tl.float32), 0.0
    for k in range(0, splits, BK):
        split = k + tl.arange(0, BK)
        mask = (split[:, None] < splits) & (j[None, :] < SIZE)
        at = split[:, None].to(tl.int64) * C
        product += tl.sum(tl.load(partial_products + (at + i) * SIZE + j[None, :], mask, 0.0), 0)
        sum_j += tl.sum(tl.load(partial_sums + at + i // SIZE * SIZE + j[None, :], mask, 0.0), 0)
        sum_i += tl.sum(tl.load(partial_sums + split * C + i, split < splits, 0.0), 0)
    tl.store(cov + i * SIZE + j, product / count - (sum_i / count) * (sum_j / count), j < SIZE)
    if tl.program_id(1) == 0:
        tl.store(shifted_mean + i, sum_i / count)


@triton.jit
def load_mean(shift, shifted_mean, g, j, SIZE: tl.constexpr):
    """Load the mean `m_j = shift_j + E[c_j]` of channels j of group g."""
    return tl.load(shift + g * SIZE + j, j < SIZE, 0.0) + tl.load(shifted_mean + g * SIZE + j, j < SIZE, 0.0)


@triton.jit
def fold_kernel(
        weight, gamma, beta, shift, shifted_mean, cov, folded, bias, mean_ptr, var_ptr, batches, inv_std_ptr, w_cov,
        eps, momentum, unbiased,
        C: tl.constexpr, OUT: tl.constexpr, SIZE: tl.constexpr, AFFINE: tl.constexpr, TRACK: tl.constexpr,
        BO: tl.constexpr, BS: tl.constexpr):
    """Compute the folded weight, and each group's part of the bias, mean, var, `1 / sqrt(var + eps)` and `W_g S_g`.

    `S_g` is `cov`. A program takes a block of output channels of one group. With TRACK, `mean_ptr` and `var_ptr` are
    the running statistics, which are updated, and `batches` is incremented. `unbiased` is the factor that makes var
    unbiased.
    """
    g = tl.program_id(1)
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    exists = o < OUT
    weight += g * SIZE
    w_cov += g * SIZE
    folded += g * SIZE
    mean, var = tl.zeros((BO,), tl.float32), tl.zeros((BO,), tl.float32)
    for first_j in range(0, SIZE, BS):
        j = first_j + tl.arange(0, BS)
        mask = exists[:, None] & (j[None, :] < SIZE)
        ws = tl.zeros((BO, BS), tl.float32)
        for first_k in range(0, SIZE, BS):
            k = first_k + tl.arange(0, BS)
            w = tl.load(weight + o[:, None] * C + k[None, :], exists[:, None] & (k[None, :] < SIZE), 0.0).to(tl.float32)
            s_at = cov + (g * SIZE + k[:, None]) * SIZE + j[None, :]
            s = tl.load(s_at, (k[:, None] < SIZE) & (j[None, :] < SIZE), 0.0)
            ws = tl.dot(w, s, ws, input_precision='ieee')
        w = tl.load(weight + o[:, None] * C + j[None, :], mask, 0.0).to(tl.float32)
        m = load_mean(shift, shifted_mean, g, j, SIZE)
        mean += tl.sum(w * m[None, :], 1)  # mu_g = W_g m_g
        var += tl.sum(ws * w, 1)  # var_g = diag(W_g S_g W_g^T)
        tl.store(w_cov + o[:, None] * C + j[None, :], ws, mask)
    var = tl.where(var < 0, 0.0, var)  # rounding may make it negative; a NaN stays NaN
    inv_std = 1 / tl.sqrt_rn(var + eps)
    scale = inv_std  # gamma_g / sqrt(var_g + eps)
    b = tl.zeros((BO,), tl.float32)
    if AFFINE:
        scale *= tl.load(gamma + g * OUT + o, exists, 0.0).to(tl.float32)
        b += tl.load(beta + g * OUT + o, exists, 0.0).to(tl.float32)
    for first_j in range(0, SIZE, BS):
        j = first_j + tl.arange(0, BS)
        mask = exists[:, None] & (j[None, :] < SIZE)
        w = tl.load(weight + o[:, None] * C + j[None, :], mask, 0.0).to(tl.float32)
        m = load_mean(shift, shifted_mean, g, j, SIZE)
        rounded = (w * scale[:, None]).to(folded.dtype.element_ty)  # W'_g
        # b'_g = beta_g - W'_g m_g with the rounded W', so that the mean of y is the sum of the betas
        b -= tl.sum(rounded.to(tl.float32) * m[None, :], 1)
        tl.store(folded + o[:, None] * C + j[None, :], rounded, mask)
    at = g * OUT + o
    tl.store(bias + at, b, exists)
    tl.store(inv_std_ptr + at, inv_std, exists)
    if TRACK:
        old = tl.load(mean_ptr + at, exists, 0.0).to(tl.float32)
        mean = old + momentum * (mean - old)
        old = tl.load(var_ptr + at, exists, 0.0).to(tl.float32)
        var = old + momentum * (var * unbiased - old)
        if (g == 0) & (tl.program_id(0) == 0):
            tl.store(batches, tl.load(batches) + 1)
    tl.store(mean_ptr + at, mean.to(mean_ptr.dtype.element_ty), exists)
    tl.store(var_ptr + at, var.to(var_ptr.dtype.element_ty), exists)


@triton.jit
def unfold_kernel(
        weight, gamma, shift, shifted_mean, inv_std_ptr, w_cov, partial_sums,
        grad_weight, grad_gamma, grad_beta, grad_var_ptr, grad_bias, splits,
        C: tl.constexpr, OUT: tl.constexpr, SIZE: tl.constexpr, AFFINE: tl.constexpr,
        BK: tl.constexpr, BO: tl.constexpr, BS: tl.constexpr):
    """Compute the backward pass of `fold_kernel` from the partial sums of `weight_gradient_kernel`.

    The results are the gradients of weight, gamma, beta and var, and `sum dy` `(OUT,)`. A program takes a block of
    output channels of one group.
    """
    N: tl.constexpr = OUT * C + OUT
    g = tl.program_id(1)
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    exists = o < OUT
    one = tl.zeros((1,), tl.int32)[None, :]
    grad_b = tl.sum(add_parts(partial_sums, splits, N, OUT * C + o[:, None] + one, exists[:, None] & (one == 0), BK), 1)
    grad = tl.zeros((BO, BS), tl.float32)
    grad_scale = tl.zeros((BO,), tl.float32)
    for first_j in range(0, SIZE, BS):
        j = first_j + tl.arange(0, BS)
        at = o[:, None] * C + g * SIZE + j[None, :]
        mask = exists[:, None] & (j[None, :] < SIZE)
        w = tl.load(weight + at, mask, 0.0).to(tl.float32)
        m = load_mean(shift, shifted_mean, g, j, SIZE)
        grad = add_parts(partial_sums, splits, N, at, mask, BK) - grad_b[:, None] * m[None, :]  # of W' in W' (x - m)
        grad_scale += tl.sum(grad * w, 1)
    inv_std = tl.load(inv_std_ptr + g * OUT + o, exists, 0.0)
    scale = inv_std
    if AFFINE:
        scale *= tl.load(gamma + g * OUT + o, exists, 0.0).to(tl.float32)
        tl.store(grad_gamma + g * OUT + o, (grad_scale * inv_std).to(grad_gamma.dtype.element_ty), exists)
        tl.store(grad_beta + g * OUT + o, grad_b.to(grad_beta.dtype.element_ty), exists)
    grad_var = -0.5 * grad_scale * scale * inv_std * inv_std  # scale = gamma / sqrt(var + eps)
    tl.store(grad_var_ptr + g * OUT + o, grad_var, exists)
    if g == 0:
        tl.store(grad_bias + o, grad_b, exists)
    for first_j in range(0, SIZE, BS):
        j = first_j + tl.arange(0, BS)
        at = o[:, None] * C + g * SIZE + j[None, :]
        mask = exists[:, None] & (j[None, :] < SIZE)
        if SIZE > BS:  # `grad` is that of another block
            m = load_mean(shift, shifted_mean, g, j, SIZE)
            grad = add_parts(partial_sums, splits, N, at, mask, BK) - grad_b[:, None] * m[None, :]
        # W' = scale W, and var = diag(W S W^T)
        grad_w = grad * scale[:, None] + 2 * grad_var[:, None] * tl.load(w_cov + at, mask, 0.0)
        tl.store(grad_weight + at, grad_w.to(grad_weight.dtype.element_ty), mask)


@triton.jit
def input_terms_kernel(
        weight, folded, shift, shifted_mean, grad_var, grad_bias, a, b, count,
        C: tl.constexpr, OUT: tl.constexpr, SIZE: tl.constexpr, COUNT_IS_TENSOR: tl.constexpr,
        BI: tl.constexpr, BO: tl.constexpr, BS: tl.constexpr):
    """Compute `A_g = 2 / count W_g^T diag(dvar_g) W_g` `(C, SIZE)` and `b = -A m - W'^T sum dy / count` `(C,)`.

    A program takes BI rows of A of one group.
    """
    if COUNT_IS_TENSOR:
        count = tl.load(count)
    g = tl.program_id(1)
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    exists = i < SIZE
    b_i = tl.zeros((BI,), tl.float32)
    for first in range(0, OUT, BO):
        o = first + tl.arange(0, BO)
        mask = exists[:, None] & (o[None, :] < OUT)
        w = tl.load(folded + o[None, :] * C + g * SIZE + i[:, None], mask, 0.0).to(tl.float32)
        b_i -= tl.sum(w * tl.load(grad_bias + o, o < OUT, 0.0)[None, :], 1) / count
    for first_j in range(0, SIZE, BS):
        j = first_j + tl.arange(0, BS)
        acc = tl.zeros((BI, BS), tl.float32)
        for first in range(0, OUT, BO):
            o = first + tl.arange(0, BO)
            mask = exists[:, None] & (o[None, :] < OUT)
            w_i = tl.load(weight + o[None, :] * C + g * SIZE + i[:, None], mask, 0.0).to(tl.float32)
            w_i *= tl.load(grad_var + g * OUT + o, o < OUT, 0.0)[None, :]
            mask = (o[:, None] < OUT) & (j[None, :] < SIZE)
            w_j = tl.load(weight + o[:, None] * C + g * SIZE + j[None, :], mask, 0.0).to(tl.float32)
            acc = tl.dot(w_i, w_j, acc, input_precision='ieee')
        rounded = (acc * (2 / count)).to(a.dtype.element_ty)
        m = load_mean(shift, shifted_mean, g, j, SIZE)
        b_i -= tl.sum(rounded.to(tl.float32) * m[None, :], 1)  # with the rounded A
        mask = exists[:, None] & (j[None, :] < SIZE)
        tl.store(a + (g * SIZE + i[:, None]) * SIZE + j[None, :], rounded, mask)
    tl.store(b + g * SIZE + i, b_i, exists)
