"""Tensors with an element a thread: kernels that are written as one thread sees them.

Nothing is left for the compiler to lay out, so that such kernels are Gluon's, compile in seconds
and keep what a thread holds in its registers. The interpreter, which knows no Gluon, runs the same
text as Triton's; INLINE tells them apart.
"""

import triton
import triton.language as tl
from triton.experimental.gluon import language as gl


@triton.jit
def threads(WARPS: tl.constexpr, INLINE: tl.constexpr):
    """0, 1, ... int32, each a thread's own."""
    if INLINE:
        return gl.arange(0, 32 * WARPS, gl.BlockedLayout([1], [32], [WARPS], [0]))
    else:
        return tl.arange(0, 32 * WARPS)


@triton.jit
def each_thread(values, WARPS: tl.constexpr, INLINE: tl.constexpr):
    """As many values as there are threads, of any shape, to an element for each, in their order."""
    values = values.reshape(32 * WARPS)
    if INLINE:
        values = gl.convert_layout(values, gl.BlockedLayout([1], [32], [WARPS], [0]))
    return values
