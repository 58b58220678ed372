"""Algorithm 1: what is drawn, and the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import noise, ops
from ..schedule import Schedule


def p_gamma(
    schedule: Schedule, seeds: Tensor, iteration: int, *, form: str = "gamma", t_seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """gamma ~ p(gamma): t uniform in 1..T, then gamma uniform in (gamma_t, gamma_{t-1}); arXiv:2104.07636,
    section 2.4.

    form "sqrt_gamma" draws sqrt(gamma) uniformly in its interval, as Janspiry's code does. seeds: int64 [B];
    t_seed: the seed whose t all samples share. Returns gamma, float64 [B], and t, int64 [B], on the CPU.
    ValueError: another form.
    """
    if form not in ("gamma", "sqrt_gamma"):
        raise ValueError(f'form must be "gamma" or "sqrt_gamma": got {form!r}')
    u, v = noise.uniforms(seeds, noise.LEVEL, iteration)
    if t_seed is not None:
        u = noise.uniforms(torch.tensor([noise.signed64(t_seed)]), noise.LEVEL, iteration)[0].expand_as(v)
    t = 1 + (schedule.T * u.double()).floor().long()
    gamma = schedule.gamma if form == "gamma" else schedule.gamma.sqrt()
    drawn = gamma[t] + v.double() * (gamma[t - 1] - gamma[t])
    return (drawn if form == "gamma" else drawn.square()), t


def denoising_loss(
    f_theta: Callable[[Tensor | None, Tensor, Tensor], Tensor],
    x: Tensor | None,
    y_0: Tensor,
    gamma: Tensor,
    level: Tensor,
    seeds: Tensor,
    iteration: int | Tensor,
    p: int = 2,
) -> Tensor:
    """E |f_theta(x, sqrt(gamma) y_0 + sqrt(1 - gamma) eps, level) - eps|^p: lines 4 and 5 of Algorithm 1.

    x, y_0: [B, C, H, W] float32; gamma: [B], float64 best (1 - gamma_1 is 1e-6, to which a float32 gamma is rounded);
    level: what the network is told of it; seeds: int64 [B], of eps.
    ValueError: p is neither 1 nor 2.
    """
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2: got {p!r}")
    y_t, eps = ops.q_sample(y_0, gamma, seeds, iteration)
    error = f_theta(x, y_t, level).float() - eps
    return error.square().mean() if p == 2 else error.abs().mean()
