"""Functions that Triton kernels share: exponentials on the fast path of the hardware, and where a head lies.

`exp2` without flush-to-zero costs three instructions more for denormals, an IEEE division about nine (read from
sm_90 machine code). With PTX=False, in the interpreter and on other backends, they are plain Triton.
"""

import triton
import triton.language as tl

from tinymim_fast.kernels import operands

# The logit, in bits, of a key that does not count. Finite, because (-inf) - (-inf) is NaN.
MASKED = tl.constexpr(-1e30)
LN_2 = tl.constexpr(0.6931471805599453)
# Programs that a GPU of 132 multiprocessors begins at once, two on each.
FIRST_PROGRAMS = 264
# The width of a tile, for constexpr arguments.
padded = triton.constexpr_function(operands.padded)


@triton.jit
def exp2(x, PTX: tl.constexpr):
    """2^x; 0 below 2^-126."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def log2(x, PTX: tl.constexpr):
    """The logarithm in bits; with PTX its error is 2^-22, relative to it or, for x near 1, absolute."""
    if PTX:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    """1 / x; with PTX within one unit in the last place."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.constexpr_function
def gain(dtype):
    """A factor on p_s - p_t for the matrix unit: near convergence, fp16 would round it as a subnormal."""
    return 1024.0 if dtype == tl.float16 else 1.0


@triton.jit
def locate(pid, num_heads, num_relations, projections):
    """Image and head of a program, and which projection its relation takes as x and as y.

    Neighbouring programs take neighbouring heads: a 16-wide half-precision row is one 32-byte sector.
    """
    head = pid % num_heads
    relation = (pid // num_heads) % num_relations
    image = pid // (num_heads * num_relations)
    # 64 bits: tensors may have more than 2^31 elements.
    code = (projections >> (4 * relation)).to(tl.int64)
    return image.to(tl.int64), head.to(tl.int64), code & 3, (code >> 2) & 3


@triton.jit
def valid_tokens(lengths_ptr, image, num_tokens):
    """min(max(length, 0), N): what `lengths` says of the image, N without."""
    if lengths_ptr is None:
        return num_tokens
    else:
        length = tl.load(lengths_ptr + image).to(tl.int64)
        return tl.minimum(tl.maximum(length, 0), num_tokens).to(tl.int32)


@triton.jit
def stagger(pid, PTX: tl.constexpr):
    """Where an SM holds two programs of four warps, one of the first two begins some 1.3 us later.

    Half a block of queries apart they hide each other's waits; in step they would want the same unit at the same time,
    and, by the simulation, stay so: each later program begins when another one ends. `%warpid` tells which place on
    the SM a program has.
    """
    if PTX:
        tl.inline_asm_elementwise(
            """{
            .reg .pred late;
            .reg .u32 place;
            mov.u32 place, %warpid;
            and.b32 place, place, 4;
            setp.ne.u32 late, place, 0;
            setp.lt.and.s32 late, $1, 264, late;  // FIRST_PROGRAMS
            @late nanosleep.u32 1300;
            mov.u32 $0, place;
            }""",
            "=r,r",
            [pid],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
