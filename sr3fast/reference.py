"""The specification: every op in plain PyTorch, in the paper's symbols. Read this first.

Each function returns what the fused kernels write. They take arguments that `ops.py` has checked, and the
float32 row arithmetic rounds operation by operation, left to right, so that every home gives the same bits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import noise as noise_v1

Origin = tuple[int, int]


def noise(
    shape: tuple[int, ...], seed: int | Tensor, step: int | Tensor, domain: int, origin: Origin, device: torch.device
) -> tuple[Tensor]:
    """z = noise(seed_i, domain, step)[c, h, w] (noise.py)."""
    seed = noise_v1.seeds(seed, shape[0], device)
    return (noise_v1.normals(seed, shape, domain, torch.as_tensor(step, device=device), origin),)


def _z(like: Tensor, seed: int | Tensor, step: int | Tensor, domain: int, origin: Origin) -> Tensor:
    return noise(tuple(like.shape), seed, step, domain, origin, like.device)[0]


def refine_row(alpha: float | Tensor, gamma: float | Tensor, step: int | Tensor) -> Tensor:
    """The paper's step as a row; float64 in, float32 [9] out."""
    alpha = torch.as_tensor(alpha, dtype=torch.float64)
    gamma = torch.as_tensor(gamma, dtype=torch.float64, device=alpha.device)
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    a = one / alpha.sqrt()
    b = -((1 - alpha) / (1 - gamma).sqrt()) / alpha.sqrt()
    s = torch.where(torch.as_tensor(step, device=alpha.device) == 1, zero, (1 - alpha).sqrt())
    return torch.stack([one, zero, one * math.inf, a, b, zero, zero, zero, s]).float()


def refine(
    y_t: Tensor,
    eps_hat: Tensor,
    alpha_t: float | Tensor,
    gamma_t: float | Tensor,
    seed: int | Tensor,
    step: int | Tensor,
    z: Tensor | None,
    origin: Origin,
) -> tuple[Tensor]:
    """y_{t-1} = (y_t - (1-alpha_t)/sqrt(1-gamma_t) eps_hat)/sqrt(alpha_t) + sqrt(1-alpha_t) z, z = 0 at step 1."""
    row = refine_row(alpha_t, gamma_t, step)
    return solver_step(y_t, eps_hat, row, seed, step, None, None, z, origin)[:1]


def solver_step(
    y: Tensor,
    eps_hat: Tensor,
    row: Tensor,
    seed: int | Tensor,
    step: int | Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    z: Tensor | None,
    origin: Origin,
) -> tuple[Tensor, Tensor]:
    """m = clip(recip y - ratio f);  y' = A y + B f + C0 m + C1 m1 + C2 m2 + S z.

    A term whose coefficient (C0, C1, C2, S) is 0 is left out.
    """
    recip, ratio, clip, a, b, c0, c1, c2, s = row.tolist()
    f = eps_hat.float()
    m = recip * y - ratio * f
    m = torch.where(m < -clip, -clip, torch.where(m > clip, clip, m))  # NaN stays NaN
    y = a * y + b * f
    for c, m_i in ((c0, m), (c1, m1), (c2, m2)):
        if c != 0:
            assert m_i is not None
            y = y + c * m_i
    if s != 0:
        y = y + s * (_z(y, seed, step, noise_v1.REFINE, origin) if z is None else z)
    return y, m


def q_sample(
    y_0: Tensor, gamma: Tensor, seed: int | Tensor, step: int | Tensor, eps: Tensor | None, origin: Origin
) -> tuple[Tensor, Tensor]:
    """y_t = sqrt(gamma) y_0 + sqrt(1 - gamma) eps."""
    gamma = gamma.view(-1, 1, 1, 1)
    signal, sigma = (square.sqrt().float().to(y_0.device) for square in (gamma, 1 - gamma))
    if eps is None:
        eps = _z(y_0, seed, step, noise_v1.TRAIN, origin)
    return signal * y_0.float() + sigma * eps.float(), eps


def group_norm_silu(
    h: Tensor,
    h2: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """act(GroupNorm(cat(h, h2) + shift)), with the groups' mean and 1/std, float32 [B, groups]."""
    s = _shifted(h, h2, shift)
    grouped = s.reshape(s.shape[0], groups, -1)
    mean = grouped.mean(-1)
    variance = (grouped - mean[..., None]).square().mean(-1)
    rstd = (variance + eps).rsqrt()
    x_hat = ((grouped - mean[..., None]) * rstd[..., None]).view_as(s)
    out = torch.addcmul(_per_channel(bias).to(s.dtype), x_hat, _per_channel(weight).to(s.dtype))
    return F.silu(out) if silu else out, mean, rstd


def add_group_norm_silu(
    h: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s = h + shift + residual, rounded to h's dtype, then group_norm_silu(s)."""
    s = (_shifted(h, None, shift) + residual.to(_wide(h))).to(h.dtype)
    out, mean, rstd = group_norm_silu(s, None, weight, bias, groups, eps, None, silu)
    return out, s, mean, rstd


def group_norm_silu_backward(
    grad: Tensor,
    h: Tensor,
    h2: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    shift: Tensor | None,
    silu: bool,
    grad_s: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """dh, dh2, dweight, dbias, dshift of group_norm_silu; `grad_s` is added to dh.

    It is the gradient of a sum s that was kept, with its shift in it: then there is no shift here.

    With n = w x_hat + b, g = grad silu'(n), <.> the mean over a group:
        dh = (w g - <w g> - x_hat <w g x_hat>) / std,  dweight = sum g x_hat,  dbias = sum g,  dshift = sum dh
    """
    s = _shifted(h, h2, shift)
    batch, channels = s.shape[:2]

    def per_group(t: Tensor) -> Tensor:
        return t.repeat_interleave(channels // groups, 1)[:, :, None, None]

    def group_mean(t: Tensor) -> Tensor:
        return per_group(t.reshape(batch, groups, -1).mean(-1))

    x_hat = (s - per_group(mean)) * per_group(rstd)
    g = grad.to(s.dtype)
    if silu:
        n = x_hat * _per_channel(weight) + _per_channel(bias)
        sigma = torch.sigmoid(n)
        g = g * sigma * (1 + n * (1 - sigma))
    wg = g * _per_channel(weight)
    dh = (wg - group_mean(wg) - x_hat * group_mean(wg * x_hat)) * per_group(rstd)
    if grad_s is not None:
        dh = dh + grad_s
    dweight, dbias, dshift = (g * x_hat).sum((0, 2, 3)), g.sum((0, 2, 3)), dh.sum((2, 3))
    if h2 is None:
        return dh, None, dweight, dbias, dshift
    return dh[:, : h.shape[1]], dh[:, h.shape[1] :], dweight, dbias, dshift


def _wide(h: Tensor) -> torch.dtype:
    return torch.float64 if h.dtype == torch.float64 else torch.float32


def _shifted(h: Tensor, h2: Tensor | None, shift: Tensor | None) -> Tensor:
    s = (h if h2 is None else torch.cat([h, h2], 1)).to(_wide(h))
    return s if shift is None else s + shift.to(s.dtype)[:, :, None, None]


def _per_channel(p: Tensor) -> Tensor:
    return p.view(1, -1, 1, 1)
