"""Functions that Triton kernels share: exponentials on the fast path of the hardware, and where a head lies.

`exp2` without flush-to-zero costs three instructions more for denormals, an IEEE division about nine (read from
sm_90 machine code). With PTX=False, in the interpreter and on other backends, they are plain Triton.
"""

import triton
import triton.language as tl

# The logit, in bits, of a key that does not count. Finite, because (-inf) - (-inf) is NaN.
MASKED = tl.constexpr(-1e30)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp2(x, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def log2(x, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def locate(pid, num_heads, num_relations, codes_x, codes_y):
    """Image and head of a program, and which projection its relation takes as x and as y.

    Neighbouring programs take neighbouring heads: a 16-wide half-precision row is one 32-byte sector.
    """
    head = pid % num_heads
    relation = (pid // num_heads) % num_relations
    image = pid // (num_heads * num_relations)
    # 64 bits: tensors may have more than 2^31 elements.
    return (
        image.to(tl.int64),
        head.to(tl.int64),
        ((codes_x >> (2 * relation)) & 3).to(tl.int64),
        ((codes_y >> (2 * relation)) & 3).to(tl.int64),
    )


@triton.jit
def valid_tokens(lengths_ptr, image, num_tokens):
    if lengths_ptr is None:
        return num_tokens
    else:
        length = tl.load(lengths_ptr + image).to(tl.int64)
        return tl.minimum(tl.maximum(length, 0), num_tokens).to(tl.int32)
