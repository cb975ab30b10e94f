"""What the codecs' kernels share: bytes to integers, elements to numbers and back, rotation.

Float operations are those of docs/codec-format.md, one at a time; kernels are launched with
``enable_fp_fusion=False``, so that none is contracted. Functions here are called by kernels only.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]

# Triton reads globals only if they are constexpr, and takes annotations for argument types.
BF16: tl.constexpr = tl.constexpr(0)
F16: tl.constexpr = tl.constexpr(1)
F32: tl.constexpr = tl.constexpr(2)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def bits(x):  # type: ignore[no-untyped-def]
    """A float32's bits."""
    return x.to(tl.uint32, bitcast=True)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def number(u):  # type: ignore[no-untyped-def]
    """The float32 of these bits."""
    return u.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def read16(at, mask):  # type: ignore[no-untyped-def]
    """An integer of 16 bits at any address."""
    low = tl.load(at, mask=mask, other=0).to(tl.uint32)
    return low | tl.load(at + 1, mask=mask, other=0).to(tl.uint32) << 8


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def read32(at, mask):  # type: ignore[no-untyped-def]
    """An integer of 32 bits at any address."""
    return read16(at, mask) | read16(at + 2, mask) << 16


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def signed16(u):  # type: ignore[no-untyped-def]
    """16 bits as a signed integer of 32."""
    return (u.to(tl.int32) << 16) >> 16


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def element(chunk, at, mask):  # type: ignore[no-untyped-def]
    """Elements of a chunk as unsigned integers."""
    mine: tl.constexpr = chunk.dtype.element_ty.primitive_bitwidth
    u = tl.load(chunk + at, mask=mask, other=0).to(tl.uint32)
    if mine == 16:
        u = u & 0xFFFF
    if mine == 8:
        u = u & 0xFF
    return u


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def odd(u, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether an element is a NaN or infinite."""
    if DTYPE == BF16:
        found = (u & 0x7F80) == 0x7F80
    elif DTYPE == F16:
        found = (u & 0x7C00) == 0x7C00
    else:
        found = (u & 0x7F800000) == 0x7F800000
    return found


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def widen(u, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """An element's number; 0 for what isn't finite."""
    if DTYPE == BF16:
        x = number(u << 16)
    elif DTYPE == F16:
        magnitude = number((u & 0x7FFF) << 13) * 5192296858534827628530496329220096.0  # 2^112
        x = number(bits(magnitude) | (u & 0x8000) << 16)
    else:
        x = number(u)
    return tl.where(odd(u, DTYPE), 0.0, x)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def bfloat16(x):  # type: ignore[no-untyped-def]
    """The bfloat16 nearest to a float32, ties to even."""
    u = bits(x)
    return (u + 0x7FFF + (u >> 16 & 1)) >> 16


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def binary16(x):  # type: ignore[no-untyped-def]
    """The binary16 nearest to a float32, ties to even, at most 65504."""
    u = bits(x)
    a = number(u & 0x7FFFFFFF)
    a = tl.where(a < 65504.0, a, 65504.0)
    tiny = bits(a + 0.5) - 0x3F000000  # in units of 2^-24
    v = bits(a)
    normal = ((v + 0xFFF + (v >> 13 & 1)) >> 13) - (112 << 10)
    return (u >> 16 & 0x8000) | tl.where(a < 6.103515625e-05, tiny, normal)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def narrow(x, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A number as an element's bits."""
    if DTYPE == BF16:
        u = bfloat16(x)
    elif DTYPE == F16:
        u = binary16(x)
    else:
        u = bits(x)
    return u


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def nearest(x):  # type: ignore[no-untyped-def]
    """The integer nearest to a float within 2^22, ties to even: adding leaves no fraction."""
    return (bits(x + 12582912.0) - 0x4B400000).to(tl.int32, bitcast=True)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def power(level):  # type: ignore[no-untyped-def]
    """2^(level / 4), for levels of -480 and more."""
    quarter = (level + 480) % 4
    whole = (level + 480) // 4 - 120
    mantissa = tl.where(quarter == 1, 0x3F9837F0, 0x3F800000)
    mantissa = tl.where(quarter == 2, 0x3FB504F3, mantissa)
    mantissa = tl.where(quarter == 3, 0x3FD744FD, mantissa)
    return number(mantissa + (whole << 23))


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def partner(d, pairs, interleaved):  # type: ignore[no-untyped-def]
    """Of element ``d`` of a head: its pair, and how far away the pair's other element lies."""
    first = tl.where(interleaved != 0, d % 2 == 0, d < pairs)
    apart = tl.where(interleaved != 0, 1, pairs)
    pair = tl.where(interleaved != 0, d // 2, tl.where(d < pairs, d, d - pairs))
    return pair, tl.where(first, apart, -apart)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def turn(x, other, cosine, sine, away):  # type: ignore[no-untyped-def]
    """An element that rotation turned: ``other`` is the pair's other one, ``away`` its distance."""
    signed = tl.where(away > 0, -sine, sine)
    return x * cosine + other * signed + 0.0  # zeros stay zeros: no -0


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def spread(sums, squares, count):  # type: ignore[no-untyped-def]
    """The variance of ``count`` numbers, from their sum and the sum of their squares."""
    mean = tl.div_rn(sums, count)
    variance = tl.div_rn(squares, count) - mean * mean
    return tl.where(variance < 0.0, 0.0, variance)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _halve(part, ROWS: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """[ROWS, 2 x COUNT] to [ROWS, COUNT]: the second half is added to the first."""
    return tl.sum(tl.reshape(part, [ROWS, 2, COUNT]), 1)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def folded(part, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """[ROWS, 16] to [ROWS], in halves."""
    part = _halve(_halve(part, ROWS, 8), ROWS, 4)
    return tl.sum(_halve(part, ROWS, 2), 1)
