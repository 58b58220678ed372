"""The noise schedule: alpha_t and gamma_t = prod_{i<=t} alpha_i, float64 on the host.

Index t runs 0..T as in the SR3 paper (arXiv:2104.07636), with alpha_0 = gamma_0 = 1: no noise.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["NAMES", "Schedule", "half_logsnr", "sigmoid2"]

NOISE_LEFT = 1e-2  # gamma_T above this: y_T still shows y_0, and pure noise is the wrong start


def half_logsnr(gamma: Tensor) -> Tensor:
    """lambda = ln(gamma / (1 - gamma)) / 2, half the log of the signal-to-noise ratio; 0 < gamma < 1."""
    return (gamma.log() - (-gamma).log1p()) / 2


def sigmoid2(lam: Tensor) -> Tensor:
    """gamma = 1 / (1 + exp(-2 lambda)), the inverse of `half_logsnr`."""
    return torch.sigmoid(2 * lam)


def _warmup(T: int, start: float, end: float, share: float) -> np.ndarray:
    betas = np.full(T, end)
    n = int(T * share)
    betas[:n] = np.linspace(start, end, n)
    return betas


def _cosine(T: int, start: float, end: float) -> np.ndarray:
    u = np.arange(T + 1) / T + 0.008
    a = np.cos(u / 1.008 * math.pi / 2) ** 2
    a = a / a[0]
    return np.minimum(1 - a[1:] / a[:-1], 0.999)


_BETAS: dict[str, Callable[[int, float, float], np.ndarray]] = {
    "linear": lambda T, start, end: np.linspace(start, end, T),
    "quad": lambda T, start, end: np.linspace(start**0.5, end**0.5, T) ** 2,
    "warmup10": lambda T, start, end: _warmup(T, start, end, 0.1),
    "warmup50": lambda T, start, end: _warmup(T, start, end, 0.5),
    "const": lambda T, start, end: np.full(T, end),
    "jsd": lambda T, start, end: 1 / np.linspace(T, 1, T),
    "cosine": _cosine,
}
NAMES = tuple(_BETAS)


class Schedule:
    """alpha_t = 1 - beta_t and gamma_t = prod_{i<=t} alpha_i, for t = 0..T.

    Built by `Schedule.named` or `Schedule.from_betas`; immutable by convention.

    Attributes:
        T: number of steps of the trained chain.
        betas: float64 [T]; betas[t - 1] = 1 - alpha_t.
        alpha: float64 [T + 1], in (0, 1], alpha[0] = 1.
        gamma: float64 [T + 1], in (0, 1], gamma[0] = 1, never rising.
        config: JSON-able dict; `Schedule.from_config(config)` gives the same schedule.
    """

    T: int
    betas: Tensor
    alpha: Tensor
    gamma: Tensor
    config: dict[str, Any]

    def __init__(self, betas: Sequence[float] | np.ndarray | Tensor, config: dict[str, Any] | None = None):
        values = betas.detach().cpu().numpy() if isinstance(betas, Tensor) else betas
        beta = np.array(values, dtype=np.float64)
        if beta.ndim != 1 or beta.size == 0:
            raise ValueError(f"betas must be a vector with one entry a step: got shape {list(beta.shape)}")
        if not np.isfinite(beta).all():
            t = int(np.flatnonzero(~np.isfinite(beta))[0]) + 1
            raise ValueError(f"betas must be finite: got beta_{t} = {beta[t - 1]}")
        bad = np.flatnonzero((beta < 0) | (beta >= 1))
        if bad.size:
            t = int(bad[0]) + 1
            raise ValueError(
                f"alpha_t = 1 - beta_t must be in (0, 1]: got beta_{t} = {beta[t - 1]:g} of T = {beta.size}"
                + (" (nothing of y_0 is left, and 1/sqrt(gamma_t) is infinite)" if beta[t - 1] == 1 else "")
            )
        alpha = np.concatenate([[1.0], 1 - beta])
        gamma = np.cumprod(alpha)
        if gamma[1] == 1:
            raise ValueError(f"gamma_1 must be below 1, a step adds noise: got beta_1 = {beta[0]:g}")
        if gamma[-1] < np.finfo(np.float32).tiny:
            raise ValueError(f"gamma_T must be at least 1.2e-38, a normal float32: got {gamma[-1]:g}")
        if gamma[-1] > NOISE_LEFT:
            warnings.warn(
                f"gamma_T = {gamma[-1]:.3g} at T = {beta.size} is above {NOISE_LEFT:g}: this does not"
                " end in pure noise. For fewer steps keep the training's schedule and give Sampler steps=.",
                stacklevel=3,
            )
        self.T = int(beta.size)
        self.betas = torch.from_numpy(beta)
        self.alpha = torch.from_numpy(alpha)
        self.gamma = torch.from_numpy(gamma)
        self.config = {"betas": beta.tolist()} if config is None else config

    @classmethod
    def named(cls, name: str = "linear", T: int = 2000, start: float = 1e-6, end: float = 1e-2) -> Schedule:
        """The schedules of Janspiry's SR3 code, in float64.

        linear: linspace(start, end, T); quad: linspace(sqrt(start), sqrt(end), T)^2; warmup10 and warmup50:
        `end` after a linear rise from `start` over that percentage of T; const: `end`; cosine: gamma follows
        cos^2, beta at most 0.999; jsd: 1/T, ..., 1/2, 1, refused because its last beta leaves gamma_T = 0.

        Args:
            name: one of linear, quad, warmup10, warmup50, const, cosine, jsd.
            T: number of steps, at least 1.
            start: the first beta.
            end: the last beta. cosine and jsd use neither start nor end.

        Raises:
            TypeError: a T that is no whole number.
            ValueError: an unknown name, T below 1, or betas that make an alpha_t outside (0, 1].
        """
        if name not in _BETAS:
            raise ValueError(f"schedule must be one of {', '.join(NAMES)}: got {name!r}")
        T = whole_number("T", T, at_least=1)
        config = {"name": name, "T": T, "start": float(start), "end": float(end)}
        return cls(_BETAS[name](T, float(start), float(end)), config)

    @classmethod
    def from_betas(cls, betas: Sequence[float] | np.ndarray | Tensor) -> Schedule:
        """A schedule from beta_1..beta_T, [T], each in [0, 1) and beta_1 > 0; computed in float64.

        Raises:
            ValueError: a beta that is not finite or makes an alpha_t outside (0, 1].
        """
        return cls(betas)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Schedule:
        """The inverse of `.config`: {"name", "T", "start", "end"} or {"betas"}."""
        if set(config) == {"betas"}:
            return cls.from_betas(config["betas"])
        unknown = sorted(set(config) - {"name", "T", "start", "end"})
        if unknown or "name" not in config:
            raise ValueError(f"a schedule has name, T, start, end, or betas alone: got {sorted(config)}")
        return cls.named(**config)

    def gamma_at(self, t: float | Sequence[float] | Tensor) -> Tensor:
        """gamma at fractional t in [0, T]: ln gamma is linear between whole t, and gamma[t] itself at them.

        Returns: float64, of t's shape.
        """
        t = torch.as_tensor(t, dtype=torch.float64)
        if not bool(((t >= 0) & (t <= self.T)).all()):
            raise ValueError(f"t must be in [0, {self.T}]: got {t.tolist()}")
        low = t.floor().long().clamp(max=self.T - 1)
        part = t - low
        log = self.gamma.log()
        between = (log[low] + part * (log[low + 1] - log[low])).exp()
        return torch.where(part == 0, self.gamma[low], torch.where(part == 1, self.gamma[low + 1], between))

    def t_at(self, gamma: float | Sequence[float] | Tensor) -> Tensor:
        """The inverse of `gamma_at`: fractional t, float64; gamma outside [gamma_T, 1] gives T or 0."""
        log = -torch.as_tensor(gamma, dtype=torch.float64).log()
        knots = -self.gamma.log()
        high = torch.searchsorted(knots, log).clamp(1, self.T)
        width = knots[high] - knots[high - 1]
        part = torch.where(width > 0, (log - knots[high - 1]) / width, torch.ones_like(width))
        return high - 1 + part.clamp(0, 1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and torch.equal(self.betas, other.betas)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        given = {k: v for k, v in self.config.items() if k != "betas"}
        how = ", ".join(f"{k}={v!r}" for k, v in given.items()) or f"betas of your own, T={self.T}"
        return f"Schedule({how}; gamma_T={self.gamma[-1].item():.3g})"


def whole_number(name: str, value: Any, at_least: int) -> int:
    """value, a whole number of Python's or NumPy's. TypeError: it is none; ValueError: it is less."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number: got {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}: got {value}")
    return int(value)
