"""Matrix products inside Triton kernels, in any of the types that kernels take."""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, total, PARTS: tl.constexpr):
    """total + a @ b on the matrix units, whose only format with the range of float32 is bfloat16 on every GPU.

    A float16 number is a sum of two of bfloat16, a float32 number of three; products below the last bit are left out.
    """
    a1, b1 = a.to(tl.bfloat16), b.to(tl.bfloat16)
    if PARTS > 1:
        a, b = a.to(tl.float32) - a1.to(tl.float32), b.to(tl.float32) - b1.to(tl.float32)
        a2, b2 = a.to(tl.bfloat16), b.to(tl.bfloat16)
        if PARTS > 2:
            a3, b3 = (a - a2.to(tl.float32)).to(tl.bfloat16), (b - b2.to(tl.float32)).to(tl.bfloat16)
            total = tl.dot(a3, b1, total)
            total = tl.dot(a1, b3, total)
            total = tl.dot(a2, b2, total)
        total = tl.dot(a2, b1, total)
        total = tl.dot(a1, b2, total)
    return tl.dot(a1, b1, total)
