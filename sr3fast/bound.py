"""The variational bound: how many bits a picture costs under p_theta.

    -log2 p_theta(y_0 given x) <= L_T + sum_{t=2..T} L_{t-1} + L_0

Source: DDPM (Ho et al. 2020), sections 2 and 3.3, with SR3's conditioning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import noise, ops
from .schedule import Schedule, half_logsnr
from .unet import evaluation_mode


def variational_bound(
    f_theta: Callable[[Tensor | None, Tensor, Tensor], Tensor],
    x: Tensor | None,
    y_0: Tensor,
    schedule: Schedule,
    seed: int = 0,
    *,
    level: str = "sqrt_gamma",
    steps: int | None = None,
) -> dict[str, Any]:
    """The variational bound on -log2 p_theta(y_0 given x), in bits a dimension, averaged over the batch.

    L_T:     KL(q(y_T given y_0), N(0, I))
    L_{t-1}: KL(q(y_{t-1} given y_0, y_t), p_theta(y_{t-1} given y_t, x)), the variance of p_theta 1 - alpha_t; it is
             (r_t - 1 - ln r_t) / 2 + w_t |eps_hat - eps|^2, w_t = (1 - alpha_t) / (2 alpha_t (1 - gamma_t)),
             r_t = (1 - gamma_{t-1}) / (1 - gamma_t)
    L_0:     -ln of the probability that N(mean_theta(y_1), 1 - alpha_1) gives to y_0's bin, see `log_bin`

    y_0: [B, C, H, W], on the 256 levels (L_0 is only then a probability). steps: the number of t, from 2 to T, at
    which the network runs, each on one draw of y_t; by default all. |eps_hat - eps|^2 is linear in lambda between
    them; r_t and w_t are summed over every t, so that all T of them give the bound itself.

    Returns {"bits", "prior", "decoder": floats, "kl": {t: float}}, bits a dimension; "kl" has L_{t-1} of the t >= 2
    that ran. ValueError: steps outside 2..T.
    """
    T, alpha, gamma = schedule.T, schedule.alpha, schedule.gamma
    least, steps = min(2, T), T if steps is None else steps
    if not least <= steps <= T:
        raise ValueError(f"steps must lie in {least}..T = {T}: got {steps}")
    seeds = noise.seeds(seed, len(y_0), y_0.device)

    def predict(t: int) -> tuple[Tensor, Tensor, float]:
        """y_t, eps_hat, and the mean of |eps_hat - eps|^2."""
        g = gamma[t].item()
        y_t, eps = ops.q_sample(y_0, g, seeds, t)
        if level == "t":
            told = torch.full((len(y_0),), t - 1, device=y_0.device)
        else:
            told = torch.full((len(y_0), 1), g if level == "gamma" else math.sqrt(g), device=y_0.device)
        with torch.no_grad(), evaluation_mode(f_theta):
            eps_hat = f_theta(x, y_t, told).double()
        return y_t.double(), eps_hat, (eps_hat - eps).square().mean().item()

    nodes = choose(schedule, steps)
    y_1, eps_hat, first = predict(1)
    errors = [first, *(predict(t)[2] for t in nodes[1:])]

    r = (1 - gamma[1:-1]) / (1 - gamma[2:])  # of t = 2..T, as w and lam
    variance = (r - 1 - r.log()) / 2
    w = (1 - alpha[2:]) / (2 * alpha[2:] * (1 - gamma[2:]))
    lam = half_logsnr(gamma[1:])
    between = np.interp(-lam[1:], -lam[[t - 1 for t in nodes]], errors)
    kl = variance + w * torch.from_numpy(between)

    a, g = alpha[1].item(), gamma[1].item()
    mean = (y_1 - (1 - a) / math.sqrt(1 - g) * eps_hat) / math.sqrt(a)
    decoder = -log_bin(y_0.double(), mean, math.sqrt(1 - a)).mean().item()
    g = gamma[-1].item()
    prior = (g * y_0.double().square().mean().item() - g - math.log1p(-g)) / 2
    bits = 1 / math.log(2)
    return {
        "bits": bits * (prior + kl.sum().item() + decoder),
        "prior": bits * prior,
        "decoder": bits * decoder,
        "kl": {t: bits * kl[t - 2].item() for t in nodes[1:]},
    }


def choose(schedule: Schedule, steps: int) -> list[int]:
    """`steps` of t = 1..T, rising, the first and the last among them: as even in lambda as whole t can be.

    lambda = ln(gamma / (1 - gamma)) / 2: in it the bound is the plain integral of |eps_hat - eps|^2 (Kingma et al.
    2021, "Variational Diffusion Models", section 5.1), while in t nearly all of it lies at the first few.
    """
    lam = half_logsnr(schedule.gamma[1:])
    chosen = [1]
    for left in range(steps - 1, 0, -1):
        here = lam[chosen[-1] - 1]
        nearest = 1 + int((lam - here - (lam[-1] - here) / left).abs().argmin())
        chosen.append(min(max(nearest, chosen[-1] + 1), schedule.T + 1 - left))
    return chosen


def log_bin(y: Tensor, mean: Tensor, std: float) -> Tensor:
    """ln of the probability that N(mean, std^2) gives to y's bin [y - 1/255, y + 1/255]; -1's and 1's bins are open."""
    upper = torch.where(y > 1 - 1 / 255, math.inf, (y + 1 / 255 - mean) / std)
    lower = torch.where(y < -1 + 1 / 255, -math.inf, (y - 1 / 255 - mean) / std)
    # in the left tail, where differences of the distribution function keep their digits
    flip = lower > 0
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    high, low = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return high + torch.log1p(-torch.exp((low - high).clamp(max=-1e-300)))
