"""Every solver is a table: host code that turns (schedule, grid) into one row of nine numbers a step.

With f = f_theta(x, y, gamma_a) and m_t = y_0_hat, a step from gamma_a to gamma_b > gamma_a is

    m_t = clip(recip y - ratio f)        recip = 1/sqrt(gamma_a), ratio = sqrt(1-gamma_a)/sqrt(gamma_a)
    y'  = A y + B f + C0 m_t + C1 m_{t+1} + C2 m_{t+2} + S z

for all of them (`ops.solver_step`); what differs is the row. Computed in float64, stored in float32.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor

from .schedule import Schedule, half_logsnr, sigmoid2, whole_number

__all__ = ["GRIDS", "LEVELS", "SOLVERS", "Row", "Table", "default", "rows"]

LEVELS = ("sqrt_gamma", "gamma", "t")
FINEST = -math.log(0.005)  # lambda where logsnr ends: an 8-bit level is 0.0078 on [-1, 1]


class Row(NamedTuple):
    """The nine numbers of `ops.solver_step`, in its order; clip = inf clips nothing."""

    recip: float
    ratio: float
    clip: float
    A: float
    B: float
    C0: float
    C1: float
    C2: float
    S: float


@dataclass(frozen=True)
class Table:
    """A solver's run: row i is evaluated at gamma[i] and run as step N - i, the number of rows that remain.

    Attributes:
        rows: float32 [N, 9], each a `Row`.
        gamma: float64 [N], the noise level at which f_theta is evaluated.
        t: int64 [N], the paper's t in 1..T: that level's own (integer grids) or the nearest.
        depth: how many earlier m a row reads at most: 0, 1 or 2. A row with C0 = 0 keeps none.
    """

    rows: Tensor
    gamma: Tensor
    t: Tensor
    depth: int

    def __len__(self) -> int:
        """N, the number of rows and of network passes."""
        return len(self.rows)

    def levels(self, level: str) -> Tensor:
        """What f_theta is conditioned on, [N]: float32 for "sqrt_gamma" (Janspiry's code) and "gamma".

        "t" is int64, the index 0..T-1 into betas: what networks with an integer input are trained on, the
        paper's t less one.
        """
        if level == "sqrt_gamma":
            return self.gamma.sqrt().float()
        if level == "gamma":
            return self.gamma.float()
        if level == "t":
            return self.t - 1
        raise ValueError(f"level must be one of {', '.join(LEVELS)}: got {level!r}")


# ---------------------------------------------------------------------------------------------- grids


def _grid_t(schedule: Schedule, N: int) -> Tensor:
    """gamma(T (1 - i/N)): levels even in t; N = T is the chain itself."""
    if N > schedule.T:
        raise ValueError(f"grid='t' has at most T levels: got steps={N} and T={schedule.T}")
    i = torch.arange(N, dtype=torch.float64)
    return schedule.gamma_at(schedule.T * (N - i) / N)


def _grid_logsnr(schedule: Schedule, N: int) -> Tensor:
    """lambda linear in i, from lambda(gamma_T) to -ln 0.005, or to lambda(gamma_1) where that is less."""
    coarse, fine = half_logsnr(schedule.gamma[[-1, 1]]).tolist()
    i = torch.arange(N, dtype=torch.float64)
    return sigmoid2(coarse + (min(FINEST, fine) - coarse) * i / max(N - 1, 1))


def _grid_blend(schedule: Schedule, N: int) -> Tensor:
    """The mean, in lambda, of logsnr and of gamma(T (1 - i/N)^2)."""
    i = torch.arange(N, dtype=torch.float64)
    quadratic = schedule.gamma_at((schedule.T * ((N - i) / N) ** 2).clamp(min=1))
    return sigmoid2((half_logsnr(_grid_logsnr(schedule, N)) + half_logsnr(quadratic)) / 2)


GRIDS: dict[str, Callable[[Schedule, int], Tensor]] = {
    "t": _grid_t,
    "logsnr": _grid_logsnr,
    "blend": _grid_blend,
}


def _named_grid(schedule: Schedule, grid: str, N: int) -> Tensor:
    gamma = GRIDS[grid](schedule, N)
    gamma[0] = schedule.gamma[-1]  # not its round trip through lambda: the run starts from y_T
    return gamma.clamp(schedule.gamma[-1], schedule.gamma[1])


def _explicit_grid(grid: Sequence[float] | Tensor, steps: int | None) -> Tensor:
    gamma = torch.as_tensor(grid, dtype=torch.float64).detach().cpu().clone()
    if gamma.ndim != 1 or len(gamma) == 0:
        raise ValueError(f"a grid is a list of gammas: got shape {list(gamma.shape)}")
    if steps is not None and steps != len(gamma):
        raise ValueError(f"steps must be the number of levels of the grid: got {steps} and {len(gamma)}")
    if not bool(((gamma > 0) & (gamma < 1)).all()):
        raise ValueError(f"a grid's gammas must be above 0 and below 1: got {gamma.tolist()}")
    if not bool((gamma.diff() > 0).all()):
        raise ValueError(f"a grid's gammas must rise, from noise to picture: got {gamma.tolist()}")
    return gamma


def _distinct(t: Tensor, T: int) -> Tensor:
    """The falling t, rounded to distinct integers in 1..T."""
    N = len(t)
    if N > T:
        raise ValueError(f"a network conditioned on integer t has at most T levels: got {N} and T={T}")
    above, distinct = T + 1, []
    for i, value in enumerate(t.tolist()):
        # below the one before, and leaving room for those that follow
        above = max(min(round(value), above - 1), N - i)
        distinct.append(above)
    return torch.tensor(distinct)


# -------------------------------------------------------------------------------------------- solvers


class Interval(NamedTuple):
    """One step from gamma_a to gamma_b > gamma_a, in the symbols of the formulas."""

    a: float
    b: float

    @property
    def last(self) -> bool:
        return self.b == 1

    @property
    def alpha(self) -> float:
        return self.a / self.b

    @property
    def h(self) -> float:
        """lambda_b - lambda_a; infinite for the last step."""
        if self.last:
            return math.inf
        return (math.log(self.b / self.a) + math.log1p(-self.a) - math.log1p(-self.b)) / 2


class Coefficients(NamedTuple):
    """The part of a `Row` in which solvers differ."""

    A: float = 0.0
    B: float = 0.0
    C0: float = 0.0
    C1: float = 0.0
    C2: float = 0.0
    S: float = 0.0


@dataclass(frozen=True)
class _Options:
    eta: float
    variance: float


Solver = Callable[[Sequence[Interval], _Options], Iterator[Coefficients]]


def _sr3(intervals: Sequence[Interval], options: _Options) -> Iterator[Coefficients]:
    """Algorithm 2: y' = (y - (1-alpha)/sqrt(1-gamma_a) f)/sqrt(alpha) + sqrt(1-alpha) z."""
    for step in intervals:
        a, alpha = step.a, step.alpha
        yield Coefficients(
            A=1 / math.sqrt(alpha),
            B=-(1 - alpha) / math.sqrt(1 - a) / math.sqrt(alpha),
            S=0.0 if step.last else math.sqrt(1 - alpha),
        )


def _ddpm(intervals: Sequence[Interval], options: _Options) -> Iterator[Coefficients]:
    """q(y_b given y_0 = m, y_a); its variance, on a log scale, from the posterior's (0) to 1 - alpha (1)."""
    for step in intervals:
        a, b, alpha = step.a, step.b, step.alpha
        posterior = (1 - b) * (1 - alpha) / (1 - a)
        yield Coefficients(
            A=math.sqrt(alpha) * (1 - b) / (1 - a),
            C0=math.sqrt(b) * (1 - alpha) / (1 - a),
            S=0.0 if step.last else math.sqrt(posterior ** (1 - options.variance) * (1 - alpha) ** options.variance),
        )


def _ddim(intervals: Sequence[Interval], options: _Options) -> Iterator[Coefficients]:
    """y' = sqrt(gamma_b) m + sqrt(1-gamma_b-s^2) eps_hat + s z, s = eta times the posterior's deviation.

    eps_hat = (y - sqrt(gamma_a) m)/sqrt(1-gamma_a), derived again so that it agrees with the clipped m.
    """
    for step in intervals:
        a, b = step.a, step.b
        s = options.eta * math.sqrt((1 - b) / (1 - a) * (1 - step.alpha))
        A = math.sqrt((1 - b - s * s) / (1 - a))
        yield Coefficients(A=A, C0=math.sqrt(b) - A * math.sqrt(a), S=s)


def _extrapolation(before: Interval | None, step: Interval) -> float:
    """1/(2r) of D = m + (m - m_prev)/(2r), r = h_prev/h; 0, first order, on the first step and the last."""
    return 0.0 if before is None or step.last else step.h / (2 * before.h)


def _dpmpp2m(intervals: Sequence[Interval], options: _Options) -> Iterator[Coefficients]:
    """y' = sqrt((1-gamma_b)/(1-gamma_a)) y + sqrt(gamma_b) (1 - e^-h) D; the last step returns m."""
    before = None
    for step in intervals:
        w = _extrapolation(before, step)
        G = math.sqrt(step.b) * -math.expm1(-step.h)
        yield Coefficients(A=math.sqrt((1 - step.b) / (1 - step.a)), C0=G * (1 + w), C1=-G * w)
        before = step


def _sde_dpmpp2m(intervals: Sequence[Interval], options: _Options) -> Iterator[Coefficients]:
    """y' = sqrt((1-gamma_b)/(1-gamma_a)) e^-h y + sqrt(gamma_b) k D + sqrt((1-gamma_b) k) z, k = 1-e^-2h."""
    before = None
    for step in intervals:
        w = _extrapolation(before, step)
        k = -math.expm1(-2 * step.h)
        G = math.sqrt(step.b) * k
        yield Coefficients(
            A=math.sqrt((1 - step.b) / (1 - step.a)) * math.exp(-step.h),
            C0=G * (1 + w),
            C1=-G * w,
            S=math.sqrt((1 - step.b) * k),
        )
        before = step


def _unipc2(intervals: Sequence[Interval], options: _Options) -> Iterator[Coefficients]:
    """UniPC of order 2, B2: dpm++2m predicts a step, and the next m corrects it.

    Predicted and corrected y share y's coefficient, so they differ by m's alone:
        y_corrected = y + q0 m_t + q1 m_{t+1} + q2 m_{t+2},
    which the next row, A y_corrected + C0 m_t + C1 m_{t+1}, takes up in its C0, C1, C2.
    """
    q = (0.0, 0.0, 0.0)
    predictor = _dpmpp2m(intervals, options)
    before = None
    for step, row in zip(intervals, predictor, strict=True):
        A, q0, q1, q2 = row.A, *q
        yield row._replace(C0=row.C0 + A * q0, C1=row.C1 + A * q1, C2=A * q2)
        if not step.last:
            q = _correction(step, _extrapolation(before, step))
        before = step


def _correction(step: Interval, w: float) -> tuple[float, float, float]:
    """(q0, q1, q2) of the corrector over `step`, which was predicted with 1/(2r) = w; w = 0: first order."""
    G = math.sqrt(step.b) * -math.expm1(-step.h)
    if w == 0:
        return G / 2, -G / 2, 0.0
    # rho solves [[1, 1], [-r, 1]] rho = b, with phi_1, phi_2, phi_3 at -h in b
    h, r = step.h, 1 / (2 * w)
    phi1 = math.expm1(-h)
    phi2 = phi1 / -h - 1
    phi3 = phi2 / -h - 0.5
    b1, b2 = phi2 / phi1, 2 * phi3 / phi1
    rho0 = (b1 - b2) / (1 + r)
    rho1 = b1 - rho0
    return G * rho1, G * (2 * w * rho0 - rho1 - w), G * w * (1 - 2 * rho0)


SOLVERS: dict[str, Solver] = {
    "sr3": _sr3,
    "ddpm": _ddpm,
    "ddim": _ddim,
    "dpm++2m": _dpmpp2m,
    "sde-dpm++2m": _sde_dpmpp2m,
    "unipc2": _unipc2,
}
EXTRAPOLATING = ("dpm++2m", "sde-dpm++2m", "unipc2")  # over the step before, which has a length then


def _langevin(gamma: float, snr: float) -> Coefficients:
    """y' = y + delta score + sqrt(2 delta) z, score = -f/sqrt(1-gamma), delta = 2 snr^2 (1-gamma)."""
    delta = 2 * snr**2 * (1 - gamma)
    return Coefficients(A=1.0, B=-delta / math.sqrt(1 - gamma), S=math.sqrt(2 * delta))


# ---------------------------------------------------------------------------------------------- table


def default(steps: int | None, grid: str | Sequence[float] | Tensor | None) -> str:
    """The solver where none is named: the paper's on every step of the chain, a second-order one on fewer."""
    return "sr3" if steps is None and (grid is None or isinstance(grid, str)) else "dpm++2m"


def rows(
    schedule: Schedule,
    *,
    solver: str | None = None,
    steps: int | None = None,
    grid: str | Sequence[float] | Tensor | None = None,
    eta: float = 0.0,
    variance: float = 0.0,
    clip: float | EllipsisType | None = ...,
    corrector_steps: int = 0,
    snr: float = 0.16,
    integer: bool = False,
    start: float | None = None,
) -> Table:
    """The table of a solver on a grid of noise levels of `schedule`.

    Args:
        schedule: the training's alpha and gamma.
        solver: "sr3", "ddpm", "ddim", "dpm++2m", "sde-dpm++2m" or "unipc2". By default "sr3" where every step
            of the chain is run (no steps, no list of gammas) and "dpm++2m" where fewer are.
        steps: levels N of a named grid, at least 1; all T by default.
        grid: "t", "logsnr", "blend", or the gammas themselves, rising, each in (0, 1). By default "t" for all
            T steps and "blend" for fewer.
        eta: ddim only, in [0, 1]: 0 is deterministic, 1 adds the posterior's noise.
        variance: ddpm only, in [0, 1]: 0 is the posterior's, 1 the paper's 1 - alpha; a log scale between.
        clip: bound on abs(y_0_hat), or None for none; 1 by default. sr3 has none and refuses one.
        corrector_steps: Langevin rows after every row but the last.
        snr: signal-to-noise ratio of a Langevin row, delta = 2 snr^2 (1 - gamma).
        integer: round the grid to distinct whole t and take gamma there, for networks conditioned on t.
        start: leave out this share of the levels, in [0, 1), to begin that far on the way.

    Raises:
        ValueError: any of these outside its range, or an option of another solver.
        TypeError: steps or corrector_steps that are not whole numbers.

    Sources: SR3 arXiv:2104.07636; DDPM arXiv:2006.11239; DDIM arXiv:2010.02502; DPM-Solver++
    arXiv:2211.01095; UniPC arXiv:2302.04867; Langevin corrector arXiv:2011.13456.
    """
    steps = None if steps is None else whole_number("steps", steps, at_least=1)
    corrector_steps = whole_number("corrector_steps", corrector_steps, at_least=0)
    solver = default(steps, grid) if solver is None else solver
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}: got {solver!r}")
    _check_share("eta", eta, solver, "ddim")
    _check_share("variance", variance, solver, "ddpm")
    if not snr > 0:
        raise ValueError(f"snr must be above 0: got {snr}")
    bound = _clip(clip, solver)

    N = steps or schedule.T
    if grid is None:
        grid = "t" if N == schedule.T else "blend"
    if isinstance(grid, str):
        if grid not in GRIDS:
            raise ValueError(f"grid must be one of {', '.join(GRIDS)} or a list of gammas: got {grid!r}")
        gamma = _named_grid(schedule, grid, N)
    else:
        gamma = _explicit_grid(grid, steps)
        low, high = schedule.gamma[-1].item(), schedule.gamma[1].item()
        if gamma[0] < low * (1 - 1e-4) or 1 - gamma[-1] < (1 - high) * 0.9:
            warnings.warn(
                f"the grid's gammas, {gamma[0].item():.3g} to 1 - {1 - gamma[-1].item():.3g}, go beyond the"
                f" trained ones, {low:.3g} to 1 - {1 - high:.3g}",
                stacklevel=2,
            )
    t = schedule.t_at(gamma).round().long().clamp(1, schedule.T)
    if integer:
        t = _distinct(schedule.t_at(gamma), schedule.T)
        gamma = schedule.gamma[t]
    if start is not None:
        if not 0 <= start < 1:
            raise ValueError(f"start must be in [0, 1), the share of the way already gone: got {start}")
        skip = min(round(start * len(gamma)), len(gamma) - 1)
        gamma, t = gamma[skip:], t[skip:]

    ends = [*gamma.tolist(), 1.0]
    if solver in EXTRAPOLATING and (flat := next((a for a, b in pairwise(ends) if a >= b), None)) is not None:
        raise ValueError(f"the levels of {solver} must rise, and betas of 0 leave them: got gamma {flat:.6g} twice")
    intervals = [Interval(a, b) for a, b in pairwise(ends)]
    table: list[tuple[Row, int]] = []  # with the index of the level at which f_theta is evaluated
    for i, weights in enumerate(SOLVERS[solver](intervals, _Options(eta, variance))):
        table.append((_row(ends[i], bound, weights), i))
        if i + 1 < len(intervals):
            langevin = _row(ends[i + 1], bound, _langevin(ends[i + 1], snr))
            table.extend([(langevin, i + 1)] * corrector_steps)
    values = torch.tensor([row for row, _ in table], dtype=torch.float64).float()
    index = torch.tensor([i for _, i in table])
    depth = 2 if bool(values[:, 7].any()) else 1 if bool(values[:, 6].any()) else 0
    return Table(values, gamma[index], t[index], depth)


def _row(gamma: float, clip: float, weights: Coefficients) -> Row:
    return Row(1 / math.sqrt(gamma), math.sqrt((1 - gamma) / gamma), clip, *weights)


def _clip(clip: float | EllipsisType | None, solver: str) -> float:
    if solver == "sr3":
        if clip is not ... and clip is not None:
            raise ValueError(f"sr3 is the paper's step, which clips nothing (ddpm does): got clip={clip}")
        return math.inf
    if clip is ...:
        return 1.0
    if clip is None:
        return math.inf
    if not clip > 0:
        raise ValueError(f"clip must be above 0, or None for no clip: got {clip}")
    return float(clip)


def _check_share(name: str, value: float, solver: str, owner: str) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1]: got {value}")
    if value and solver != owner:
        raise ValueError(f"{name} is an option of {owner}: got {name}={value} for {solver}")
