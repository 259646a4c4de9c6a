"""Triton kernels for a GPU, launched by the modules whose work they do; needs triton at import.

Only `tl.constexpr` may annotate an argument: Triton evaluates annotations when it compiles.
"""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def load_map(pointer, at, index, inside, step, maps, away):
    """Load the numbers `away` maps from those at `at`; 0 beyond the first and the last map."""
    other = index + away
    return tl.load(
        pointer + at + away * step, mask=inside & (other >= 0) & (other < maps), other=0.0
    )


@triton.jit
def widen(x, wide: tl.constexpr, relu: tl.constexpr):
    """Convert x to the type to compute in, and take max(x, 0) if `relu`; NaN stays."""
    x = x.to(wide)
    if relu:
        x = tl.where(x < 0, 0.0, x)
    return x


@triton.jit
def norm_forward(x, y, n, step, maps, k, alpha, relu: tl.constexpr, BLOCK: tl.constexpr):
    """y_i = x_i s_i^-.75 with s_i = k + alpha * (sum of x_j^2, |i - j| <= 2)."""
    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    index = (at // step) % maps
    total = tl.zeros([BLOCK], wide)
    own = widen(load_map(x, at, index, inside, step, maps, 0), wide, relu)
    for away in tl.static_range(-2, 3):
        other = widen(load_map(x, at, index, inside, step, maps, away), wide, relu)
        total += other * other
    s = k + alpha * total
    root = 1.0 / tl.sqrt(s)
    tl.store(y + at, (own * root * tl.sqrt(root)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward(x, dy, dx, n, step, maps, k, alpha, relu: tl.constexpr, BLOCK: tl.constexpr):
    """dx_i = g_i s_i^-.75 - 1.5 alpha x_i * (sum of g_j x_j s_j^-1.75, |i - j| <= 2)."""
    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    index = (at // step) % maps
    own = widen(load_map(x, at, index, inside, step, maps, 0), wide, relu)
    direct = tl.zeros([BLOCK], wide)
    others = tl.zeros([BLOCK], wide)
    for away in tl.static_range(-2, 3):
        total = tl.zeros([BLOCK], wide)
        for further in tl.static_range(-2, 3):
            other = widen(load_map(x, at, index, inside, step, maps, away + further), wide, relu)
            total += other * other
        s = k + alpha * total
        root = 1.0 / tl.sqrt(s)
        g = load_map(dy, at, index, inside, step, maps, away).to(wide) * root * tl.sqrt(root)
        if away == 0:
            direct = g
        neighbor = widen(load_map(x, at, index, inside, step, maps, away), wide, relu)
        others += g * neighbor * root * root
    result = direct - 1.5 * alpha * own * others
    if relu:
        result = tl.where(own <= 0, 0.0, result)
    tl.store(dx + at, result.to(dx.dtype.element_ty), mask=inside)


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
