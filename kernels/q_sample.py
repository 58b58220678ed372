"""q(y_t given y_0) with its noise drawn in registers: y_t = sqrt(gamma) y_0 + sqrt(1 - gamma) eps.

sr3fast/reference.py is the specification.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .noise import normals, seed_of, step_of
from .pixels import dense, draws, launch, load, locate, on_host, place, store, strided, strides

TRAIN = tl.constexpr(2)  # noise v1's domain


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step", "h0", "w4_0", "cut"])
def q_sample_kernel(
    out_ptr, eps_out_ptr, into_ptr, n0, n1, n2, n3, y_ptr, eps_ptr, gamma_ptr, GAMMAS: tl.constexpr, signal, noise,
    seed_ptr, seed_low, seed_high, step_ptr, step, PER_SAMPLE: tl.constexpr, INTO_DENSE: tl.constexpr,
    h0, w4_0, cut, blocks, height, width, quads,
    C: tl.constexpr, K: tl.constexpr, PLANAR: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, c, r, h, w4 = locate(blocks, height, quads, C, K, BLOCK)
    offsets, masks = dense(b, c, r, h, w4, cut, height, width, quads, C, K, PLANAR, ALIGNED)
    ys = load(y_ptr, offsets, masks, K)
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + (b if GAMMAS else 0))
        signal, noise = tl.sqrt(gamma).to(tl.float32), tl.sqrt(1.0 - gamma).to(tl.float32)
    if eps_ptr is not None:
        eps = load(eps_ptr, offsets, masks, K)
    else:
        seed = seed_of(b, seed_ptr, seed_low, seed_high, PER_SAMPLE)
        eps = normals(seed, TRAIN, step_of(step_ptr, step), c, h, w4, h0, w4_0, K)
    xs = ()
    for k in tl.static_range(K):
        xs = xs + (signal * ys[k].to(tl.float32) + noise * eps[k].to(tl.float32),)
    store(out_ptr, xs, offsets, masks, K)
    if eps_out_ptr is not None:
        store(eps_out_ptr, eps, offsets, masks, K)
    if into_ptr is not None:
        into_offsets = offsets if INTO_DENSE else strided(b, c, h, w4, cut, n0, n1, n2, n3, K)
        store(into_ptr, xs, into_offsets, masks, K)


def q_sample(
    outs: tuple[Tensor, Tensor | None, Tensor | None],
    y_0: Tensor,
    gamma: Tensor,
    seed: int | Tensor,
    step: int | Tensor,
    eps: Tensor | None,
    origin: tuple[int, int],
) -> None:
    """Fills y_t, eps where it was drawn and is wanted, and into's copy of y_t."""
    out, eps_out, into = outs
    grid, pixels = place(y_0, origin)
    host = gamma.ndim == 0 and on_host(gamma)
    signal, noise = ((gamma.sqrt().item(), (1 - gamma).sqrt().item())) if host else (0.0, 0.0)
    launch(
        q_sample_kernel,
        grid,
        y_0,
        out_ptr=out,
        eps_out_ptr=eps_out,
        into_ptr=into,
        **strides("n", into),
        y_ptr=y_0,
        eps_ptr=eps,
        gamma_ptr=None if host else gamma,
        GAMMAS=gamma.ndim == 1,
        signal=signal,
        noise=noise,
        INTO_DENSE=into is None or into.stride() == y_0.stride(),
        **draws(seed, step),
        **pixels,
    )
