"""Triton kernels for a GPU, launched by the modules whose work they do; needs triton at import.

Only `tl.constexpr` may annotate an argument: Triton evaluates annotations when it compiles.

A lane of the kernels for normalization is COUNT maps of a pixel that follow each other in memory
or in distances of STEP. A window is these and EDGE maps on each side: a tuple of pieces
[lanes, maps], of which the one in the middle has COUNT maps and the others at most 2. Sums over
neighbors are computed on its columns, tensors [lanes]. So each neighbor is loaded and squared once
for all that need it, and everything stays in the registers of one thread. Sizes are constants,
which makes divisions multiplications; offsets have 32 bits unless LONG.
"""
# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton has no starred expressions)

import triton
import triton.language as tl


@triton.jit
def write_one(x):
    """x[0] = 1: shows that kernels run at all."""
    tl.store(x, 1.0)


@triton.jit
def split_columns(x, COUNT: tl.constexpr):
    """The columns of [lanes, COUNT], a tuple of tensors [lanes]; COUNT is a power of two."""
    if COUNT == 1:
        return (tl.reshape(x, [x.shape[0]]),)
    elif COUNT == 2:
        return tl.split(x)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], COUNT // 2, 2]))
        evens = split_columns(even, COUNT // 2)
        odds = split_columns(odd, COUNT // 2)
        columns = ()
        for i in tl.static_range(COUNT // 2):
            columns = columns + (evens[i], odds[i])
        return columns


@triton.jit
def join_columns(columns, FIRST: tl.constexpr, COUNT: tl.constexpr, EVERY: tl.constexpr = 1):
    """[lanes, COUNT] of the columns FIRST, FIRST + EVERY, ...; COUNT is a power of two."""
    if COUNT == 1:
        return tl.reshape(columns[FIRST], [columns[FIRST].shape[0], 1])
    elif COUNT == 2:
        return tl.join(columns[FIRST], columns[FIRST + EVERY])
    else:
        even = join_columns(columns, FIRST, COUNT // 2, 2 * EVERY)
        odd = join_columns(columns, FIRST + EVERY, COUNT // 2, 2 * EVERY)
        return tl.reshape(tl.join(even, odd), [even.shape[0], COUNT])


@triton.jit
def split_pieces(pieces):
    """The columns of all pieces."""
    columns = ()
    for i in tl.static_range(len(pieces)):
        columns = columns + split_columns(pieces[i], pieces[i].shape[1])
    return columns


@triton.jit
def join_pieces(columns, COUNT: tl.constexpr, EDGE: tl.constexpr):
    """The pieces of a window, from all of its columns."""
    SIDE: tl.constexpr = 2 if COUNT > 1 else 1
    pieces = ()
    for i in tl.static_range(0, EDGE, SIDE):
        pieces = pieces + (join_columns(columns, i, SIDE),)
    pieces = pieces + (join_columns(columns, EDGE, COUNT),)
    for i in tl.static_range(COUNT + EDGE, COUNT + 2 * EDGE, SIDE):
        pieces = pieces + (join_columns(columns, i, SIDE),)
    return pieces


@triton.jit
def load_piece(pointer, at, there, STEP: tl.constexpr, COUNT: tl.constexpr):
    """Load [lanes, COUNT]: the map at `at` and those after it; 0 in lanes that are not `there`."""
    if STEP == 1:
        offsets = at[:, None] + tl.arange(0, COUNT)[None, :]
        return tl.load(pointer + offsets, mask=there[:, None], other=0)
    else:
        columns = ()
        for i in tl.static_range(COUNT):
            columns = columns + (tl.load(pointer + at + i * STEP, mask=there, other=0),)
        return join_columns(columns, 0, COUNT)


@triton.jit
def load_window(
    pointer, at, there, index, MAPS: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Load a window; 0 beyond the maps of the column, of which `index` is the one at `at`."""
    # No piece lies in two columns: its size divides COUNT, and COUNT divides MAPS.
    SIDE: tl.constexpr = 2 if COUNT > 1 else 1
    pieces = ()
    for i in tl.static_range(-EDGE, 0, SIDE):
        before = there & (index + i >= 0)
        pieces = pieces + (load_piece(pointer, at + i * STEP, before, STEP, SIDE),)
    pieces = pieces + (load_piece(pointer, at, there, STEP, COUNT),)
    for i in tl.static_range(COUNT, COUNT + EDGE, SIDE):
        after = there & (index + i < MAPS)
        pieces = pieces + (load_piece(pointer, at + i * STEP, after, STEP, SIDE),)
    return pieces


@triton.jit
def store_piece(pointer, at, there, x, STEP: tl.constexpr, COUNT: tl.constexpr):
    """Store [lanes, COUNT] where `load_piece` would load it, rounded to the type of the memory."""
    x = x.to(pointer.dtype.element_ty)
    if STEP == 1:
        offsets = at[:, None] + tl.arange(0, COUNT)[None, :]
        tl.store(pointer + offsets, x, mask=there[:, None])
    else:
        columns = split_columns(x, COUNT)
        for i in tl.static_range(COUNT):
            tl.store(pointer + at + i * STEP, columns[i], mask=there)


@triton.jit
def widen(pieces, relu: tl.constexpr):
    """Convert to the type to compute in, and take max(x, 0) if `relu`; NaN stays."""
    wide: tl.constexpr = tl.float64 if pieces[0].dtype == tl.float64 else tl.float32
    found = ()
    for i in tl.static_range(len(pieces)):
        x = pieces[i].to(wide)
        if relu:
            x = tl.maximum(x, 0.0, tl.PropagateNan.ALL)
        found = found + (x,)
    return found


@triton.jit
def sum_neighbors(columns):
    """Sums of five columns each: of each column with two on both sides, as far as there are."""
    pairs = ()
    sums = ()
    for i in tl.static_range(len(columns) - 2):
        pairs = pairs + (columns[i] + columns[i + 1],)
    for i in tl.static_range(len(columns) - 4):
        sums = sums + (pairs[i] + pairs[i + 2] + columns[i + 4],)
    return sums


@triton.jit
def scale(x, k: tl.constexpr, alpha: tl.constexpr, COUNT: tl.constexpr, EDGE: tl.constexpr):
    """Compute s^-.5 and s^-.75 of a window as windows with an edge smaller by 2.

    s_i = k + alpha * (sum of x_j^2, |i - j| <= 2).
    """
    squares = ()
    for i in tl.static_range(len(x)):
        squares = squares + (x[i] * x[i],)
    sums = join_pieces(sum_neighbors(split_pieces(squares)), COUNT, EDGE - 2)
    roots = ()
    powers = ()
    for i in tl.static_range(len(sums)):
        # A bare constant would be rounded to float32, even beside float64.
        s = tl.full([1, 1], k, x[0].dtype) + tl.full([1, 1], alpha, x[0].dtype) * sums[i]
        root = tl.rsqrt(s)
        roots = roots + (root,)
        powers = powers + (root * tl.sqrt(root),)
    return roots, powers


@triton.jit
def normalize(x, k: tl.constexpr, alpha: tl.constexpr, COUNT: tl.constexpr):
    """Compute y_i = x_i s_i^-.75 of the piece in the middle of a window with an edge of 2."""
    _, powers = scale(x, k, alpha, COUNT, 2)
    return x[len(x) // 2] * powers[0]


@triton.jit
def differentiate(
    x, dy, k: tl.constexpr, alpha: tl.constexpr, relu: tl.constexpr, COUNT: tl.constexpr
):
    """Gradient of the piece in the middle, from a window of x (edge 4) and one of dy (edge 2).

    dx_i = g_i s_i^-.75 - 1.5 alpha x_i * (sum of g_j x_j s_j^-1.75, |i - j| <= 2).
    """
    roots, powers = scale(x, k, alpha, COUNT, 4)
    terms = ()
    for i in tl.static_range(len(dy)):
        term = dy[i] * powers[i] * x[i + len(dy) // 2] * (roots[i] * roots[i])
        terms = terms + (term,)
    others = join_columns(sum_neighbors(split_pieces(terms)), 0, COUNT)
    own = x[len(x) // 2]
    direct = dy[len(dy) // 2] * powers[len(dy) // 2]
    dx = direct - tl.full([1, 1], 1.5 * alpha, own.dtype) * own * others
    if relu:
        dx = tl.where(own <= 0, 0.0, dx)
    return dx


@triton.jit
def find_lanes(n, BLOCK: tl.constexpr, LONG: tl.constexpr):
    """Numbers of a program's lanes, and which of them are below n."""
    program = tl.program_id(0).to(tl.int64) if LONG else tl.program_id(0)
    lane = program * BLOCK + tl.arange(0, BLOCK)
    return lane, lane < n


@triton.jit
def find_maps(
    n, MAPS: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    """Offset of each lane's first number, its map within the column, and which lanes exist."""
    lane, inside = find_lanes(n, BLOCK, LONG)
    group = lane // STEP
    return group * (COUNT * STEP) + lane % STEP, group % (MAPS // COUNT) * COUNT, inside


@triton.jit
def norm_forward(
    x, y, n, k: tl.constexpr, alpha: tl.constexpr, relu: tl.constexpr, MAPS: tl.constexpr,
    STEP: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """y = x normalized across maps, of relu(x) if `relu`."""
    at, index, inside = find_maps(n, MAPS, STEP, COUNT, BLOCK, LONG)
    window = widen(load_window(x, at, inside, index, MAPS, STEP, COUNT, 2), relu)
    store_piece(y, at, inside, normalize(window, k, alpha, COUNT), STEP, COUNT)


@triton.jit
def norm_backward(
    x, dy, dx, n, k: tl.constexpr, alpha: tl.constexpr, relu: tl.constexpr, MAPS: tl.constexpr,
    STEP: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Gradient of x, from x and the gradient of y."""
    at, index, inside = find_maps(n, MAPS, STEP, COUNT, BLOCK, LONG)
    window = widen(load_window(x, at, inside, index, MAPS, STEP, COUNT, 4), relu)
    above = widen(load_window(dy, at, inside, index, MAPS, STEP, COUNT, 2), False)
    found = differentiate(window, above, k, alpha, relu, COUNT)
    store_piece(dx, at, inside, found, STEP, COUNT)


@triton.jit
def pick_larger(best, index, x, number, there, CUT: tl.constexpr):
    """The larger of `best` and x, and its index of the two; the first of equals, NaN before all.

    With CUT, x counts only in the lanes that are `there`.
    """
    if CUT:
        x = tl.where(there[:, None], x, float("-inf"))
    index = tl.where(x > best, number, index)
    return tl.maximum(best, x, tl.PropagateNan.ALL), index


@triton.jit
def pool_row(
    x, at, inside, index, left, k: tl.constexpr, alpha: tl.constexpr, relu: tl.constexpr,
    norm: tl.constexpr, MAPS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
    WINDOW: tl.constexpr, COUNT: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """The largest of WINDOW pixels of a row, and which; with CUT, the row may end before."""
    EDGE: tl.constexpr = 2 if norm else 0
    best = tl.full([at.shape[0], COUNT], float("-inf"), tl.float32)
    where = tl.full([at.shape[0], COUNT], 0, tl.int32)
    for right in tl.static_range(WINDOW):
        there = inside
        if CUT:
            there = inside & (left + right < WIDTH)
        window = load_window(x, at + right * CHANNELS, there, index, MAPS, 1, COUNT, EDGE)
        window = widen(window, relu)
        y = normalize(window, k, alpha, COUNT) if norm else window[0]
        if right == 0:
            best = y
        else:
            best, where = pick_larger(best, where, y, right, there, CUT)
    return best, where


@triton.jit
def pool_forward(
    x, y, origin, n, k: tl.constexpr, alpha: tl.constexpr, relu: tl.constexpr, norm: tl.constexpr,
    keep: tl.constexpr, MAPS: tl.constexpr, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr, POOLED_HEIGHT: tl.constexpr, POOLED_WIDTH: tl.constexpr,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr,
    BLOCK: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """The largest of each window; if `keep` its index in the window, or 255 where relu cut it.

    A lane is COUNT maps of ROWS windows below each other, which share rows. All arrays are
    [images, height, width, CHANNELS].
    """
    STRIPS: tl.constexpr = (POOLED_HEIGHT + ROWS - 1) // ROWS
    lane, inside = find_lanes(n, BLOCK, LONG)
    first = lane % (CHANNELS // COUNT) * COUNT
    strip = lane // (CHANNELS // COUNT)
    ox = strip % POOLED_WIDTH
    strip = strip // POOLED_WIDTH
    oy = strip % STRIPS * ROWS
    image = strip // STRIPS
    left = ox * STRIDE
    corner = ((image * HEIGHT + oy * STRIDE) * WIDTH + left) * CHANNELS + first
    to = ((image * POOLED_HEIGHT + oy) * POOLED_WIDTH + ox) * CHANNELS + first
    rows = ()  # the largest of each row, and which
    for window in tl.static_range(ROWS):
        best = tl.full([BLOCK, COUNT], 0, tl.float32)
        where = tl.full([BLOCK, COUNT], 0, tl.int32)
        for down in tl.static_range(WINDOW):
            # Only in the last strip can rows lie below the image.
            there = inside & (oy * STRIDE + (window * STRIDE + down) < HEIGHT)
            if (window == 0) | (down >= WINDOW - STRIDE):  # else the window above had the row
                rows = rows + pool_row(
                    x, corner + (window * STRIDE + down) * (WIDTH * CHANNELS), there, first % MAPS,
                    left, k, alpha, relu, norm, MAPS, CHANNELS, WIDTH, WINDOW, COUNT,
                    (POOLED_WIDTH - 1) * STRIDE + WINDOW > WIDTH,
                )  # fmt: skip
            if down == 0:
                best = rows[window * STRIDE * 2]
                where = rows[window * STRIDE * 2 + 1]
            else:
                best, where = pick_larger(
                    best, where, rows[(window * STRIDE + down) * 2],
                    rows[(window * STRIDE + down) * 2 + 1] + down * WINDOW, there,
                    ((STRIPS - 1) * ROWS + window) * STRIDE + down >= HEIGHT,
                )  # fmt: skip
        there = inside & (oy + window < POOLED_HEIGHT)
        at = to + window * (POOLED_WIDTH * CHANNELS)
        store_piece(y, at, there, best, 1, COUNT)
        if keep:
            if relu:
                where = tl.where(best <= 0, 255, where)
            store_piece(origin, at, there, where, 1, COUNT)


@triton.jit
def collect(
    above, origin, down: tl.constexpr, over: tl.constexpr, WINDOW: tl.constexpr,
    STRIDE: tl.constexpr, REACH: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of those windows whose largest is pixel (down, over) of a lane."""
    SPAN: tl.constexpr = len(above) // (REACH * REACH)
    found = ()
    for piece in tl.static_range(SPAN):
        total = tl.full(above[piece].shape, 0, above[piece].dtype)
        for i in tl.static_range(REACH):
            for j in tl.static_range(REACH):
                # The pixel's place in the window, counted from its first row and column.
                y = down + (REACH - 1 - i) * STRIDE
                z = over + (REACH - 1 - j) * STRIDE
                if y < WINDOW and z < WINDOW:
                    taken = origin[(i * REACH + j) * SPAN + piece] == y * WINDOW + z
                    total += tl.where(taken, above[(i * REACH + j) * SPAN + piece], 0.0)
        found = found + (total,)
    return found


@triton.jit
def pool_backward(
    x, dy, origin, dx, n, k: tl.constexpr, alpha: tl.constexpr, relu: tl.constexpr,
    norm: tl.constexpr, MAPS: tl.constexpr, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr, POOLED_HEIGHT: tl.constexpr, POOLED_WIDTH: tl.constexpr,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    """Gradient of x: each pixel collects from the windows whose largest it is; no two add to one.

    A lane is COUNT maps of STRIDE x STRIDE pixels, which share the windows that cover them.
    """
    EDGE: tl.constexpr = 2 if norm else 0
    REACH: tl.constexpr = (WINDOW + STRIDE - 1) // STRIDE  # windows over a pixel, in a row
    ACROSS: tl.constexpr = (WIDTH + STRIDE - 1) // STRIDE
    DOWN: tl.constexpr = (HEIGHT + STRIDE - 1) // STRIDE
    lane, inside = find_lanes(n, BLOCK, LONG)
    first = lane % (CHANNELS // COUNT) * COUNT
    index = first % MAPS
    square = lane // (CHANNELS // COUNT)
    right = square % ACROSS
    square = square // ACROSS
    below = square % DOWN
    image = square // DOWN
    above = ()
    origins = ()
    for i in tl.static_range(REACH):  # from the first window over the pixels to the last
        for j in tl.static_range(REACH):
            oy = below - (REACH - 1 - i)
            ox = right - (REACH - 1 - j)
            there = inside & (oy >= 0) & (oy < POOLED_HEIGHT) & (ox >= 0) & (ox < POOLED_WIDTH)
            at = ((image * POOLED_HEIGHT + oy) * POOLED_WIDTH + ox) * CHANNELS + first
            window = load_window(dy, at, there, index, MAPS, 1, COUNT, EDGE)
            above = above + widen(window, False)
            origins = origins + load_window(origin, at, there, index, MAPS, 1, COUNT, EDGE)
    for down in tl.static_range(STRIDE):
        for over in tl.static_range(STRIDE):
            found = collect(above, origins, down, over, WINDOW, STRIDE, REACH)
            y = below * STRIDE + down
            z = right * STRIDE + over
            there = inside & (y < HEIGHT) & (z < WIDTH)
            at = ((image * HEIGHT + y) * WIDTH + z) * CHANNELS + first
            gradient = found[0]
            if norm:
                window = widen(load_window(x, at, there, index, MAPS, 1, COUNT, 4), relu)
                gradient = differentiate(window, found, k, alpha, relu, COUNT)
            store_piece(dx, at, there, gradient, 1, COUNT)


@triton.jit
def mix(word):
    """SplitMix64's finalizer of uint64 words, as in `model.layers`."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    return word ^ (word >> 31)


@triton.jit(do_not_specialize=["n"])
def dropout(
    x, y, position, keys, n, UNITS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y = x times the bits of `draw_dropout_mask`; n words of 64 bits, one after the other.

    A thread draws a word for the few units of it that it loads together: [BLOCK, 64] is divided
    among the threads along the units.
    """
    WORDS: tl.constexpr = (UNITS + 63) // 64
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, word = at // WORDS, at % WORDS  # one column of one sample, one after the other
    key = tl.load(keys + row % COLUMNS)
    sample = tl.load(position) + row // COLUMNS
    start = mix((sample + key).to(tl.uint64))
    bits = mix(start + (word + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
    shift = tl.arange(0, 64)[None, :]
    unit = word[:, None] * 64 + shift
    inside = (at < n)[:, None]
    if UNITS % 64:
        inside = inside & (unit < UNITS)
    here = row.to(tl.int64)[:, None] * UNITS + unit
    value = tl.load(x + here, mask=inside, other=0.0)
    kept = ((bits[:, None] >> shift.to(tl.uint64)) & 1) != 0
    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    tl.store(y + here, (value.to(wide) * kept.to(wide)).to(value.dtype), mask=inside)
