"""Noise v1 in Triton: the same lines as sr3fast/noise.py and csrc/common/noise.h, the same bits.

Every float operation rounds by itself: launch with enable_fp_fusion=False, and negate by x * -1.0 (older
Tritons compute -x as 0 - x).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .pixels import dense, draws, launch, locate, place, store

_HALF_PI_2_30 = tl.constexpr(1.5707963267948966 / 2**30)


@triton.jit
def philox(k0, k1, c0, c1, c2, c3):
    """Philox4x32-10: four 32-bit words for each counter."""
    for _ in tl.static_range(10):
        hi0, lo0 = tl.umulhi(c0, 0xD2511F53), tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        hi1, lo1 = tl.umulhi(c2, 0xCD9E8D57), tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def box_muller(a, b):
    """Two normals from two 32-bit words: a gives the radius, b the angle."""
    u = ((a >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-7
    i = u.to(tl.int32, bitcast=True)
    e = (i - 0x3F3504F3) >> 23
    f = (i - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    e = e.to(tl.float32)
    s = f * f
    p = f * 7.0376836292e-2 + -1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f + -1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f + -1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f + -2.4999993993e-1
    p = p * f + 3.3333331174e-1
    y = p * f * s
    y = y + e * -2.12194440e-4
    y = y - s * 0.5
    log_u = (f + y) + e * 0.693359375
    radius = tl.sqrt_rn(log_u * -2.0)

    q = (((b >> 29) + 1) >> 1) & 3
    v = tl.sub(b, q << 30, sanitize_overflow=False).to(tl.int32, bitcast=True).to(tl.float32) * _HALF_PI_2_30
    v2 = v * v
    sin = ((v2 * -1.9515295891e-4 + 8.3321608736e-3) * v2 - 1.6666654611e-1) * v2 * v + v
    cos = ((v2 * 2.443315711809948e-5 - 1.388731625493765e-3) * v2 + 4.166664568298827e-2) * v2 * v2 - v2 * 0.5 + 1.0
    odd = (q & 1) == 1
    x = tl.where(odd, sin, cos)
    y = tl.where(odd, cos, sin)
    x = tl.where((q == 1) | (q == 2), x * -1.0, x)
    y = tl.where(q >= 2, y * -1.0, y)
    return radius * x, radius * y


@triton.jit
def four(z0, z1, z2, z3):
    """Four tensors [BLOCK] side by side, [BLOCK, 4]."""
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [z0.shape[0], 4])


@triton.jit
def quad(seed, domain: tl.constexpr, step, c, h, w4):
    """The normals of pixels 4 w4 .. 4 w4 + 3 of row h, in the coordinates of the whole image."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    zero = (w4 * 0).to(tl.uint32)
    a0, a1, a2, a3 = philox(k0, k1, w4, h, zero + step, zero + c.to(tl.uint32) + domain * 65536)
    z0, z1 = box_muller(a0, a1)
    z2, z3 = box_muller(a2, a3)
    return z0, z1, z2, z3


@triton.jit
def normals(seed, domain: tl.constexpr, step, c, h, w4, h0, w4_0, K: tl.constexpr):
    """The lanes' noise: K tiles [BLOCK, 4], their elements in the order of `pixels.tile`."""
    h = (h + h0).to(tl.uint32)
    w4 = (w4 + w4_0).to(tl.uint32)
    a0, a1, a2, a3 = quad(seed, domain, step, c, h, w4)
    if K == 1:
        return (four(a0, a1, a2, a3),)
    else:
        b0, b1, b2, b3 = quad(seed, domain, step, c + 1, h, w4)
        if K == 2:
            return four(a0, b0, a1, b1), four(a2, b2, a3, b3)
        else:
            c0, c1, c2, c3 = quad(seed, domain, step, c + 2, h, w4)
            if K == 3:
                return four(a0, b0, c0, a1), four(b1, c1, a2, b2), four(c2, a3, b3, c3)
            else:
                d0, d1, d2, d3 = quad(seed, domain, step, c + 3, h, w4)
                return four(a0, b0, c0, d0), four(a1, b1, c1, d1), four(a2, b2, c2, d2), four(a3, b3, c3, d3)


@triton.jit
def seed_of(b, seed_ptr, seed_low, seed_high, PER_SAMPLE: tl.constexpr):
    """The sample's 64 bits, uint64."""
    if PER_SAMPLE:
        return tl.load(seed_ptr + b).to(tl.uint64)
    else:
        if seed_ptr is None:
            seed = (seed_high.to(tl.uint32).to(tl.uint64) << 32) | seed_low.to(tl.uint32).to(tl.uint64)
        else:
            seed = tl.load(seed_ptr).to(tl.uint64)
        return tl.add(seed, b.to(tl.uint64), sanitize_overflow=False)


@triton.jit
def step_of(step_ptr, step):
    """The step's low 32 bits, uint32."""
    if step_ptr is not None:
        step = tl.load(step_ptr)
    return step.to(tl.uint32)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step", "h0", "w4_0", "cut"])
def noise_kernel(
    out_ptr, seed_ptr, seed_low, seed_high, step_ptr, step, DOMAIN: tl.constexpr, PER_SAMPLE: tl.constexpr,
    h0, w4_0, cut, blocks, height, width, quads,
    C: tl.constexpr, K: tl.constexpr, PLANAR: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, c, r, h, w4 = locate(blocks, height, quads, C, K, BLOCK)
    seed = seed_of(b, seed_ptr, seed_low, seed_high, PER_SAMPLE)
    z = normals(seed, DOMAIN, step_of(step_ptr, step), c, h, w4, h0, w4_0, K)
    offsets, masks = dense(b, c, r, h, w4, cut, height, width, quads, C, K, PLANAR, ALIGNED)
    store(out_ptr, z, offsets, masks, K)


def noise(outs: tuple[Tensor], seed: int | Tensor, step: int | Tensor, domain: int, origin: tuple[int, int]) -> None:
    """out[i] = noise(seed_i, domain, step)[c, h, w]."""
    (out,) = outs
    grid, pixels = place(out, origin)
    launch(noise_kernel, grid, out, out_ptr=out, DOMAIN=domain, **draws(seed, step), **pixels)
