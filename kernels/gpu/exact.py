"""Products that are rounded on their own, and normals with the bits of the reference.

A compiler may contract a product and a sum into one operation that rounds once, and torch.compile
does not pass on the switch that forbids it. Products that feed a sum are therefore written as the
machine's own instruction, which names its rounding and is left alone; without such a product
nothing is left to contract. On the interpreter NumPy rounds each operation as it is.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from fastscore_kernels.gpu.common import INTERPRETED

# see fastscore_kernels.noise, whose arithmetic this repeats step by step
_HALF_ROOT_BITS = tl.constexpr(0x3FE6A09E667F3BCD)
_MANTISSA_BITS = tl.constexpr(2**52 - 1)
_LOG_TERMS = tl.constexpr(tuple(-4 / (2 * k + 1) for k in range(9)))
_SIN_TERMS = tl.constexpr(tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(8)))
_MINUS_2_LOG_2 = tl.constexpr(-2 * math.log(2))
_QUARTER_TURN = tl.constexpr(math.pi / 2 / 2**32)


@triton.jit
def product32(a, b):
    """a * b in fp32, rounded to nearest, subnormals kept."""
    if INTERPRETED:
        return a * b
    else:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def product64(a, b):
    """a * b in fp64, rounded to nearest."""
    if INTERPRETED:
        return a * b
    else:
        return tl.inline_asm_elementwise(
            "mul.rn.f64 $0, $1, $2;", "=d,d,d", [a, b], dtype=tl.float64, is_pure=True, pack=1
        )


@triton.jit
def quotient64(a, b):
    """a / b in fp64, rounded to nearest."""
    if INTERPRETED:
        return a / b
    else:
        return tl.inline_asm_elementwise(
            "div.rn.f64 $0, $1, $2;", "=d,d,d", [a, b], dtype=tl.float64, is_pure=True, pack=1
        )


@triton.jit
def root64(a):
    """Square root in fp64, rounded to nearest."""
    if INTERPRETED:
        return tl.sqrt(a)
    else:
        return tl.inline_asm_elementwise(
            "sqrt.rn.f64 $0, $1;", "=d,d", [a], dtype=tl.float64, is_pure=True, pack=1
        )


@triton.jit
def circle(quarter):
    """Cosine and sine, fp64, of four times an fp64 angle in (-pi/4, pi/4)."""
    square = product64(quarter, quarter)
    sine = product64(square, tl.full(quarter.shape, _SIN_TERMS[7], tl.float64))
    for k in tl.static_range(6, 0, -1):
        sine = product64(sine + tl.full(quarter.shape, _SIN_TERMS[k], tl.float64), square)
    sine = product64(sine + tl.full(quarter.shape, _SIN_TERMS[0], tl.float64), quarter)
    square = product64(sine, sine)
    # doubling is exact: contracted or not, the bits are the same
    half_sine = product64(root64(1.0 - square), sine) * 2.0
    half_cosine = 1.0 - square * 2.0
    sine = product64(half_cosine, half_sine) * 2.0
    return 1.0 - product64(half_sine, half_sine) * 2.0, sine


@triton.jit
def box_muller(radius, angle):
    """Two fp64 normals sqrt(-2 log u) (cos a, sin a) from two uint32 words."""
    # u = (word + 1/2) / 2^32 in (0, 1) = mantissa 2^exponent, sqrt(1/2) <= mantissa < sqrt(2)
    u = (radius.to(tl.float64) + 0.5) * 2.0**-32
    bits = u.to(tl.int64, bitcast=True) - _HALF_ROOT_BITS
    exponent = (bits >> 52).to(tl.float64)
    mantissa = ((bits & _MANTISSA_BITS) + _HALF_ROOT_BITS).to(tl.float64, bitcast=True)
    q = quotient64(mantissa - 1.0, mantissa + 1.0)
    square = product64(q, q)
    length = product64(square, tl.full(q.shape, _LOG_TERMS[8], tl.float64))
    for k in tl.static_range(7, 0, -1):
        length = product64(length + tl.full(q.shape, _LOG_TERMS[k], tl.float64), square)
    length = product64(length + tl.full(q.shape, _LOG_TERMS[0], tl.float64), q)
    scale = tl.full(q.shape, _MINUS_2_LOG_2, tl.float64)
    length = root64(length + product64(exponent, scale))
    # a quarter of the angle lies in (-pi/4, pi/4); doubling it twice covers the circle
    turn = tl.full(q.shape, _QUARTER_TURN, tl.float64)
    cosine, sine = circle(product64(angle.to(tl.float64) + (0.5 - 2.0**31), turn))
    return product64(cosine, length), product64(sine, length)


@triton.jit
def draw_normals(seed, sample, step, draw, block, QUADS: tl.constexpr):
    """[4 QUADS] fp32 normals: Philox blocks block .. block + QUADS - 1, four normals each.

    seed, sample, step int64 scalars; draw a whole number.
    """
    counter = (block + tl.arange(0, QUADS)).to(tl.uint32)
    zero = tl.zeros((QUADS,), dtype=tl.int64)
    step_word = (zero + step).to(tl.uint32)
    sample_word = (zero + sample).to(tl.uint32)
    draw_word = (zero + draw).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, counter, step_word, sample_word, draw_word, 10)
    cosine0, sine0 = box_muller(w0, w1)
    cosine1, sine1 = box_muller(w2, w3)
    # [QUADS, 2, 2]: pair, then cosine before sine
    cosines = tl.join(cosine0.to(tl.float32), cosine1.to(tl.float32))
    sines = tl.join(sine0.to(tl.float32), sine1.to(tl.float32))
    return tl.reshape(tl.join(cosines, sines), (4 * QUADS,))
