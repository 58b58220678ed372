"""The refinement step and every solver's row, in one kernel: noise drawn in registers, each operation rounded alone.

    m  = clip(recip y - ratio f)
    y' = A y + B f + C0 m + C1 m1 + C2 m2 + S z       a term whose C or S is 0 is left out

sr3fast/reference.py is the specification.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .noise import normals, seed_of, step_of
from .pixels import dense, draws, launch, load, load_if, locate, on_host, place, store, strided, strides

REFINE = tl.constexpr(1)  # noise v1's domain


@triton.jit
def refine_row(alpha, gamma):
    """A, B and S of the paper's step; float64 in, float32 out."""
    root = tl.sqrt(alpha)
    a = 1.0 / root
    b = ((1.0 - alpha) / tl.sqrt(1.0 - gamma)) * -1.0 / root
    s = tl.sqrt(1.0 - alpha)
    return a.to(tl.float32), b.to(tl.float32), s.to(tl.float32)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step", "h0", "w4_0", "cut"])
def step_kernel(
    out_ptr, m_ptr, into_ptr, n0, n1, n2, n3,
    y_ptr, f_ptr, f0, f1, f2, f3, m1_ptr, m2_ptr, z_ptr,
    row_ptr, alpha_ptr, gamma_ptr, recip, ratio, clip, a, b_, c0, c1, c2, s,
    seed_ptr, seed_low, seed_high, step_ptr, step, PER_SAMPLE: tl.constexpr,
    PAPER: tl.constexpr, F_DENSE: tl.constexpr, INTO_DENSE: tl.constexpr,
    h0, w4_0, cut, blocks, height, width, quads,
    C: tl.constexpr, K: tl.constexpr, PLANAR: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, c, r, h, w4 = locate(blocks, height, quads, C, K, BLOCK)
    step = step_of(step_ptr, step)
    if row_ptr is not None:
        recip, ratio, clip = tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2)
        a, b_ = tl.load(row_ptr + 3), tl.load(row_ptr + 4)
        c0, c1, c2, s = tl.load(row_ptr + 5), tl.load(row_ptr + 6), tl.load(row_ptr + 7), tl.load(row_ptr + 8)
    if alpha_ptr is not None:
        a, b_, s = refine_row(tl.load(alpha_ptr), tl.load(gamma_ptr))
    if PAPER:
        s = tl.where(step == 1, 0.0, s)

    offsets, masks = dense(b, c, r, h, w4, cut, height, width, quads, C, K, PLANAR, ALIGNED)
    f_offsets = offsets if F_DENSE else strided(b, c, h, w4, cut, f0, f1, f2, f3, K)
    into_offsets = offsets if INTO_DENSE else strided(b, c, h, w4, cut, n0, n1, n2, n3, K)

    # all loads first, so that they fly together
    ys, fs = load(y_ptr, offsets, masks, K), load(f_ptr, f_offsets, masks, K)
    m1s = () if m1_ptr is None else load_if(c1, m1_ptr, offsets, masks, K)
    m2s = () if m2_ptr is None else load_if(c2, m2_ptr, offsets, masks, K)
    zs = () if z_ptr is None else load_if(s, z_ptr, offsets, masks, K)

    xs, ms = (), ()
    for k in tl.static_range(K):
        y, f = ys[k], fs[k].to(tl.float32)
        x = a * y + b_ * f
        if not PAPER:
            m = recip * y - ratio * f
            m = tl.where(m < clip * -1.0, clip * -1.0, tl.where(m > clip, clip, m))  # NaN stays NaN
            ms = ms + (m,)
            x = tl.where(c0 != 0.0, x + c0 * m, x)
            if m1_ptr is not None:
                x = tl.where(c1 != 0.0, x + c1 * m1s[k], x)
            if m2_ptr is not None:
                x = tl.where(c2 != 0.0, x + c2 * m2s[k], x)
        if z_ptr is not None:
            x = tl.where(s != 0.0, x + s * zs[k], x)
        xs = xs + (x,)
    if m_ptr is not None:
        store(m_ptr, ms, offsets, masks, K)

    if z_ptr is None and s != 0.0:
        seed = seed_of(b, seed_ptr, seed_low, seed_high, PER_SAMPLE)
        drawn = normals(seed, REFINE, step, c, h, w4, h0, w4_0, K)
        noisy = ()
        for k in tl.static_range(K):
            noisy = noisy + (xs[k] + s * drawn[k],)
        store(out_ptr, noisy, offsets, masks, K)
        if into_ptr is not None:
            store(into_ptr, noisy, into_offsets, masks, K)
    else:
        store(out_ptr, xs, offsets, masks, K)
        if into_ptr is not None:
            store(into_ptr, xs, into_offsets, masks, K)


def _run(
    outs: tuple[Tensor, Tensor | None, Tensor | None],
    y: Tensor,
    eps_hat: Tensor,
    row: dict[str, Any],
    seed: int | Tensor,
    step: int | Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    z: Tensor | None,
    origin: tuple[int, int],
    paper: bool,
) -> None:
    out, m, into = outs
    grid, pixels = place(y, origin)
    launch(
        step_kernel,
        grid,
        y,
        out_ptr=out,
        m_ptr=m,
        into_ptr=into,
        **strides("n", into),
        y_ptr=y,
        f_ptr=eps_hat,
        **strides("f", eps_hat),
        m1_ptr=m1,
        m2_ptr=m2,
        z_ptr=z,
        **row,
        PAPER=paper,
        F_DENSE=eps_hat.stride() == y.stride(),
        INTO_DENSE=into is None or into.stride() == y.stride(),
        **draws(seed, step),
        **pixels,
    )


def refine(
    outs: tuple[Tensor, Tensor | None],
    y_t: Tensor,
    eps_hat: Tensor,
    alpha_t: float | Tensor,
    gamma_t: float | Tensor,
    seed: int | Tensor,
    step: int | Tensor,
    z: Tensor | None,
    origin: tuple[int, int],
) -> None:
    """y_{t-1} = (y_t - (1-alpha_t)/sqrt(1-gamma_t) eps_hat)/sqrt(alpha_t) + sqrt(1-alpha_t) z, z = 0 at step 1."""
    out, into = outs
    if on_host(alpha_t):
        alpha, gamma = float(alpha_t), float(gamma_t)
        a = 1 / math.sqrt(alpha)
        b = -((1 - alpha) / math.sqrt(1 - gamma)) / math.sqrt(alpha)
        row = _row(1, 0, math.inf, a, b, 0, 0, 0, math.sqrt(1 - alpha))
    else:
        row = _row(1, 0, math.inf, 0, 0, 0, 0, 0, 0) | {"alpha_ptr": alpha_t, "gamma_ptr": gamma_t}
    _run((out, None, into), y_t, eps_hat, row, seed, step, None, None, z, origin, paper=True)


def solver_step(
    outs: tuple[Tensor, Tensor | None, Tensor | None],
    y: Tensor,
    eps_hat: Tensor,
    row: Tensor,
    seed: int | Tensor,
    step: int | Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    z: Tensor | None,
    origin: tuple[int, int],
) -> None:
    """m = clip(recip y - ratio f);  y' = A y + B f + C0 m + C1 m1 + C2 m2 + S z."""
    if on_host(row):
        numbers = row.tolist()
        m1, m2 = (m if c != 0 else None for m, c in zip((m1, m2), numbers[6:8], strict=True))
        keywords = _row(*numbers)
    else:
        keywords = _row(*(0.0,) * 9) | {"row_ptr": row}
    _run(outs, y, eps_hat, keywords, seed, step, m1, m2, z, origin, paper=False)


def _row(*numbers: float) -> dict[str, Any]:
    """The keywords of a row by value, rounded to float32."""
    names = ("recip", "ratio", "clip", "a", "b_", "c0", "c1", "c2", "s")
    values = zip(names, struct.unpack("9f", struct.pack("9f", *numbers)), strict=True)
    return {"row_ptr": None, "alpha_ptr": None, "gamma_ptr": None, **dict(values)}
